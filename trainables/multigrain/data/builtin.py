"""Built-in images, written to disk in the layout that `folders.read_dataset` reads.

`digits` are 1,797 scans of handwritten digits (UCI, shipped with scikit-learn). `shapes` are drawn, for tests and
benchmarks that need larger images. Both get a copy-detection set in the layout of INRIA Copydays, made by distorting
held-out images, so class, instance and copies of an image are known.
"""

import csv
import fcntl
import io
import math
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from multigrain.config.data import DataSettings
from multigrain.data.folders import stable_order
from multigrain.hooks import Progress

VAL_SHARE = 0.25
COPYDAYS_ORIGINALS = 157
"""Number of originals in INRIA Copydays; here at most half of the held-out images."""
CROPS = (20, 50, 80)
"""Percentages of the area that are cut away: three of Copydays' nine."""
QUALITIES = (75, 30, 10, 5)
"""JPEG qualities: four of Copydays' nine."""
SHAPES = ("circle", "cross", "diamond", "ring", "square", "star", "triangle", "wave")


class BuiltinImage(NamedTuple):
    """A built-in image with its class."""

    image: Image.Image
    class_name: str
    name: str


def digits(size: int = 32) -> Iterator[BuiltinImage]:
    """Yield the 1,797 handwritten digits, 8 x 8 scans enlarged to `size` x `size` pixels."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    for index, (scan, label) in enumerate(zip(scans.images, scans.target, strict=True)):
        grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
        yield BuiltinImage(grey.resize((size, size), Image.Resampling.BICUBIC), str(label), f"digit{index:04d}")


def _outline(shape: str, centre: tuple[float, float], radius: float, turn: float) -> list[tuple[float, float]]:
    """Return the corners of a shape whose outermost point is `radius` away from the centre."""

    def around(radii: Iterable[float]) -> list[tuple[float, float]]:
        spokes = list(radii)
        angles = [turn + 2 * math.pi * step / len(spokes) for step in range(len(spokes))]
        return [
            (centre[0] + radius * spoke * math.cos(angle), centre[1] + radius * spoke * math.sin(angle))
            for spoke, angle in zip(spokes, angles, strict=True)
        ]

    if shape == "wave":
        return around(0.75 + 0.25 * math.sin(2 * math.pi * 6 * step / 120) for step in range(120))
    radii = {
        "circle": [1.0] * 60,
        "ring": [1.0] * 60,
        "triangle": [1.0] * 3,
        "square": [1.0] * 4,
        "diamond": [1.0, 0.5] * 2,
        "star": [1.0, 0.4] * 5,
        "cross": [1.0, 0.35, 1.0] * 4,
    }
    return around(radii[shape])


def _texture(rng: random.Random, size: int) -> np.ndarray:
    """Draw stripes of two random colours with noise: (size, size, 3) uint8."""
    colours = np.array([[rng.randrange(256) for _ in range(3)] for _ in range(2)], dtype=float)
    angle, period = rng.uniform(0, math.pi), rng.uniform(0.06, 0.3) * size
    y, x = np.mgrid[:size, :size]
    mix = 0.5 + 0.5 * np.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / period)
    grain = np.random.default_rng(rng.randrange(2**32)).normal(0, 12, (size, size, 1))
    stripes = colours[0] + mix[..., None] * (colours[1] - colours[0])
    return np.clip(stripes + grain, 0, 255).astype(np.uint8)


def shapes(images: int, size: int, seed: int = 0) -> Iterator[BuiltinImage]:
    """Yield `images` textured shapes on textured grounds, `size` x `size` pixels, eight classes in turn."""
    for index in range(images):
        rng = random.Random(f"{seed}/{index}")
        shape = SHAPES[index % len(SHAPES)]
        image = Image.fromarray(_texture(rng, size))
        radius = rng.uniform(0.22, 0.38) * size
        centre = (rng.uniform(0.4, 0.6) * size, rng.uniform(0.4, 0.6) * size)
        mask = Image.new("L", (size, size))
        draw = ImageDraw.Draw(mask)
        draw.polygon(_outline(shape, centre, radius, rng.uniform(0, 2 * math.pi)), fill=255)
        if shape == "ring":
            draw.polygon(_outline("circle", centre, radius / 2, 0.0), fill=0)
        image.paste(Image.fromarray(_texture(rng, size)), mask=mask)
        yield BuiltinImage(image, shape, f"shape{index:06d}")


def _cut(image: Image.Image, percent: float, rng: random.Random) -> Image.Image:
    """Cut away `percent` of the area at random, keeping the proportions of the image."""
    scale = math.sqrt(1 - percent / 100)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def _compress(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def strong_copies(image: Image.Image, rng: random.Random) -> list[Image.Image]:
    """Return two distorted copies: one rotated and re-lit, one cropped and blurred; both are compressed."""
    turned = image.rotate(rng.choice((-1, 1)) * rng.uniform(10, 30), Image.Resampling.BICUBIC)
    relit = ImageEnhance.Contrast(turned).enhance(rng.uniform(0.5, 1.5))
    relit = ImageEnhance.Brightness(relit).enhance(rng.uniform(0.6, 1.4))
    blurred = _cut(image, rng.uniform(20, 50), rng).filter(
        ImageFilter.GaussianBlur(image.width * rng.uniform(0.01, 0.04))
    )
    return [_compress(relit, 20), _compress(blurred, 20)]


def _save(image: Image.Image, path: Path, quality: int = 95) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=quality)


def write_copies(pictures: list[BuiltinImage], root: Path) -> None:
    """Write Copydays' folders: `original`, `strong`, `crops/*`, `jpegqual/*`, `distractors`."""
    count = min(COPYDAYS_ORIGINALS, len(pictures) // 2)
    for block, picture in enumerate(pictures[:count], start=2000):
        rng = random.Random(picture.name)
        _save(picture.image, root / "original" / f"{block}00.png")
        for number, copy in enumerate(strong_copies(picture.image, rng), start=1):
            _save(copy, root / "strong" / f"{block}{number:02d}.jpg")
        for percent in CROPS:
            _save(_cut(picture.image, percent, rng), root / "crops" / str(percent) / f"{block}00.jpg")
        for quality in QUALITIES:
            _save(picture.image, root / "jpegqual" / str(quality) / f"{block}00.jpg", quality)
    for picture in pictures[count:]:
        _save(picture.image, root / "distractors" / f"{picture.name}.png")


def write(pictures: Iterable[BuiltinImage], length: int, folder: Path, progress: Progress) -> None:
    """Write a data set with a fixed split, recorded in `split.csv`; after a crash there is no folder.

    The hash of a picture's name alone decides whether the picture is held out.
    """
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    held_out: list[BuiltinImage] = []
    with (draft / "split.csv").open("w", newline="") as file:
        record = csv.writer(file)
        record.writerow(["file", "class", "split"])
        for picture in progress(pictures, f"writing {folder.name}", length):
            split = "val" if int(stable_order(picture.name)[:8], 16) < VAL_SHARE * 16**8 else "train"
            path = Path(split) / picture.class_name / f"{picture.name}.png"
            _save(picture.image, draft / path)
            record.writerow([path.as_posix(), picture.class_name, split])
            if split == "val":
                held_out.append(picture)
    write_copies(sorted(held_out, key=lambda picture: stable_order(picture.name)), draft / "copies")
    draft.rename(folder)


def write_builtin(settings: DataSettings, root: Path, progress: Progress) -> Path:
    """Write the built-in source of the settings below `root`, unless it exists; return its folder."""
    if settings.builtin == "digits":
        folder, pictures, length = root / "digits", digits(), 1797
    else:
        folder = root / f"shapes-{settings.images}x{settings.image_size}"
        pictures, length = shapes(settings.images, settings.image_size), settings.images
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process writes, and others wait
        if not folder.exists():
            write(pictures, length, folder, progress)
    return folder

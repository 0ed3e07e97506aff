"""Checking image files before training, and leaving out broken images on request.

This module does not import torch: an experiment file is checked, its images included, before anything heavy is loaded.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from multigrain.data import decoding
from multigrain.data.dataset import CopySet, Dataset
from multigrain.digests import digest
from multigrain.errors import DataError
from multigrain.hooks import Progress, no_progress

SMALLEST = 2
"""Smallest width and height of an image, in pixels."""
AHEAD = 1024
"""Number of images that are given to the threads at once."""
MOST = 10
"""Limit for leaving out images: at most one image in this number."""
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
"""Surrogates, by which Python represents bytes of a path that are not UTF-8."""


class ImageFacts(NamedTuple):
    """Properties of an image file, found when it was decoded."""

    format: str
    """Pillow's name, such as `JPEG`."""
    width: int
    height: int
    turned: bool
    """True if its EXIF orientation turns or mirrors it."""
    content: bytes
    """Digest of the decoded pixels; of a large JPEG, decoded at a fraction of its size."""
    outline: bytes
    """Perceptual hash of 128 bits. It differs by few bits between an image and its copy in another size or quality."""


def examine(dataset: Dataset, progress: Progress = no_progress) -> dict[Path, ImageFacts | str]:
    """Decode every image once, in threads; return its facts, or the predicate of a sentence on why it is unusable."""
    paths = dataset.paths
    with ThreadPoolExecutor() as threads:
        found = (
            facts
            for start in range(0, len(paths), AHEAD)
            for facts in threads.map(_examine, paths[start : start + AHEAD])
        )
        return dict(zip(paths, progress(found, "checking images", len(paths)), strict=True))


def faults(examined: Mapping[Path, ImageFacts | str]) -> dict[Path, str]:
    """Return the images that cannot be used, each with the predicate of a sentence."""
    return {path: fault for path, fault in examined.items() if isinstance(fault, str)}


def image_problems(faults: Mapping[Path, str]) -> list[str]:
    """Return a sentence for each image that cannot be used."""
    return [
        f"every image must be usable, but {path} {fault}; repair or remove it, or set data.skip_broken to true"
        for path, fault in faults.items()
    ]


def _examine(path: Path) -> ImageFacts | str:
    """Decode a file to its end."""
    try:
        with decoding.opened(path) as image:
            width, height = image.size
            if min(width, height) < SMALLEST:
                return f"is {width} x {height} pixels, but needs {SMALLEST} each way"
            turned = decoding.orientation(image, upright=True) != 1
            kind = image.format or "unknown"
            image.draft("RGB", (64, 64))  # a JPEG is then decoded at a fraction of its size, but to its last byte
            pixels = decoding.pixels(image, upright=True)
    except Exception as error:  # Pillow raises many types, SyntaxError among them
        return decoding.fault(error)
    content = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    content.update(pixels.tobytes())
    return ImageFacts(kind, width, height, turned, content.digest(), outline(pixels))


def outline(pixels: NDArray[np.uint8]) -> bytes:
    """Hash an image (H, W, 3) by its large shapes: 128 bits, which say where its brightness rises.

    The image is averaged to 9 x 9 cells of grey; each of 8 x 8 cells is compared with its right and lower neighbour.
    """
    small = Image.fromarray(pixels).convert("L").resize((9, 9), Image.Resampling.BOX)
    grey = np.asarray(small)
    rises = grey[:8, 1:] > grey[:8, :8], grey[1:, :8] > grey[:8, :8]
    return np.packbits(rises).tobytes()


def leave_out(dataset: Dataset, faults: Mapping[Path, str]) -> tuple[Dataset, dict[Path, str]]:
    """Remove broken images from a data set; return the rest, and each removed image with the reason.

    A query whose original is broken is removed, too, and so is an image whose name a manifest cannot hold.

    Raises:
        DataError: the rest cannot be used.
    """
    left_out = dict(faults)
    for path in dataset.paths:
        if _NOT_UTF8.search(str(path)):
            left_out.setdefault(path, "has a name that is not UTF-8")
    copies = dataset.copies and _intact_copies(dataset.copies, left_out)
    train = [index for index, path in enumerate(dataset.train) if path not in left_out]
    val = [index for index, path in enumerate(dataset.val) if path not in left_out]
    first: dict[int, int] = {}
    intact = replace(
        dataset,
        train=tuple(dataset.train[index] for index in train),
        train_labels=tuple(dataset.train_labels[index] for index in train),
        val=tuple(dataset.val[index] for index in val),
        val_labels=tuple(dataset.val_labels[index] for index in val),
        copies=copies,
        instances=tuple(first.setdefault(dataset.instances[old], new) for new, old in enumerate(train)),
    )
    if problems := _problems(dataset, intact, left_out):
        raise DataError(problems)
    return intact, left_out


def _intact_copies(copies: CopySet, left_out: dict[Path, str]) -> CopySet | None:
    """Remove images from a copy-detection set; queries that lose their original are added to `left_out`."""
    for path, index in zip(copies.queries, copies.truth, strict=True):
        if (original := copies.database[index]) in left_out:
            left_out.setdefault(path, f"is a copy of {original}, which is left out")
    place: dict[int, int] = {}
    for index, path in enumerate(copies.database):
        if path not in left_out:
            place[index] = len(place)
    queries = [number for number, path in enumerate(copies.queries) if path not in left_out]
    if not queries:
        return None
    return CopySet(
        tuple(copies.database[index] for index in place),
        tuple(copies.queries[number] for number in queries),
        tuple(place[copies.truth[number]] for number in queries),
    )


def _problems(dataset: Dataset, intact: Dataset, left_out: Mapping[Path, str]) -> list[str]:
    problems = []
    if (count := len(left_out)) * MOST > (total := len(dataset.paths)):
        path, fault = next(iter(left_out.items()))
        problems.append(
            f"at most a tenth of the images may be left out, but {count} of {total} cannot be used, the first of them "
            f"because {path} {fault}; repair or remove them"
        )
    parts = (
        ("train", dataset.train_labels, intact.train_labels),
        ("val", dataset.val_labels, intact.val_labels),
    )
    for part, before, after in parts:
        problems += [
            f"every class needs an intact image, but all {before.count(label)} of {dataset.classes[label]!r} in {part} "
            "cannot be used; repair them or remove the class"
            for label in sorted(set(before) - set(after))
        ]
    lost = [name for name in dataset.metrics if name not in intact.metrics]
    if lost:
        problems.append(f"without the images that cannot be used there is no {' and no '.join(lost)}; repair them")
    return problems


def write_intact(manifest: str, skipped: str, root: Path) -> Path:
    """Write `intact-<digest>/manifest.csv` and `skipped.txt` below `root`; return the path of the manifest.

    The digest is that of the content, so processes that write at the same time write the same files.
    """
    content = {"skipped.txt": skipped.encode(errors="backslashreplace"), "manifest.csv": manifest.encode()}
    name = digest(b"\0".join(content.values()))[:12]
    folder = root / f"intact-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in content.items():
        draft = folder / f"{file}.{os.getpid()}"
        draft.write_bytes(data)
        draft.replace(folder / file)
    return folder / "manifest.csv"

"""What keeps a single image file from being used, and what does not."""

import random
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from multigrain.data.folders import read_dataset
from multigrain.data.loading import decode
from multigrain.data.validation import AHEAD, examine, faults, image_problems

GOOD = ("train/a/0.png", "train/a/1.png", "val/a/2.png")


def write_images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20, 120, 220)).save(root / name)


def faults_of(dataset, *progress):
    return faults(examine(dataset, *progress))


def problems_of(dataset, *progress):
    return image_problems(faults_of(dataset, *progress))


@pytest.fixture
def place(tmp_path):
    """The folder of a class, beside good images; `tmp_path` is the data set's."""
    write_images(tmp_path, *GOOD)
    return tmp_path / "train/a"


def png(width, height, depth, rows):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_header(width, height):
    return png(width, height, 8, bytes(64))


def truncated_jpeg(path):
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    noise.save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-200])


def flipped_png(path):
    Image.new("RGB", (8, 8)).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[19] ^= 1  # in the width
    path.write_bytes(content)


def frames(kind, count):
    def save(path):
        images = [Image.new("RGB", (8, 8), (80 * number, 0, 0)) for number in range(count)]
        images[0].save(path, kind, save_all=True, append_images=images[1:])

    return save


SPOILERS = {
    "bomb.png": (lambda path: path.write_bytes(png_header(65000, 65000)), "is 65,000 x 65,000 pixels, but at most"),
    "cut.jpg": (truncated_jpeg, "is cut short or damaged"),
    "dark.png": (
        lambda path: path.write_bytes(png(2, 2, 16, (b"\0" + b"\x0f\xff" * 6) * 2)),
        "has 16 bits for each channel, but no value above 4,095",
    ),
    "empty.png": (lambda path: path.write_bytes(b""), "is empty"),
    "flat.png": (lambda path: Image.new("RGB", (40, 1)).save(path), "is 40 x 1 pixels, but needs 2 each way"),
    "header.png": (flipped_png, "is cut short, damaged, or a kind of PNG"),
    "nowhere.png": (lambda path: path.write_bytes(png_header(0, 8)), "is "),
    "page.jpg": (lambda path: path.write_text("\n<!DOCTYPE html>\n<title>404</title>"), "is a web page, not an image"),
    "pages.tif": (frames("TIFF", 2), "has several pages"),
    "text.jpg": (lambda path: path.write_text("see you later"), "is not an image"),
    "thin.png": (lambda path: Image.new("L", (1, 40)).save(path), "is 1 x 40 pixels, but needs 2 each way"),
    "xhtml.jpg": (lambda path: path.write_text('<?xml version="1.0"?><HTML lang="en">'), "is a web page"),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_a_spoilt_image_is_told_with_its_reason(tmp_path, place, name):
    spoil, reason = SPOILERS[name]
    spoil(place / name)
    ((path, fault),) = faults_of(read_dataset(tmp_path)).items()
    assert path == place / name
    assert reason in fault
    assert str(path) not in fault


def test_all_spoilt_images_are_told_in_order_and_no_other(tmp_path, place):
    for name, (spoil, _) in SPOILERS.items():
        spoil(place / name)
    problems = problems_of(read_dataset(tmp_path))
    assert len(problems) == len(SPOILERS)
    for (name, (_, reason)), problem in zip(sorted(SPOILERS.items()), problems, strict=True):
        assert f"{place / name} {reason}" in problem
        assert "repair or remove it, or set data.skip_broken to true" in problem


@pytest.mark.parametrize("place", ["train/a", "val/a", "copies/original", "copies/strong", "copies/distractors"])
def test_a_spoilt_image_is_told_wherever_it_lies(tmp_path, place):
    write_images(tmp_path, *GOOD, "copies/original/200000.png", "copies/strong/200001.png", "copies/distractors/0.png")
    spoilt = tmp_path / place / ("200100.png" if place == "copies/original" else "200002.png")
    spoilt.write_bytes(b"")
    (problem,) = problems_of(read_dataset(tmp_path))
    assert f"{spoilt} is empty" in problem


def test_a_decompression_bomb_takes_no_memory(tmp_path, place):
    SPOILERS["bomb.png"][0](place / "0.png")
    data = read_dataset(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(problems_of(data)) == 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, "KB; the pixels would be 12 GB"


def test_a_file_that_is_gone_or_may_not_be_read_is_told_by_the_systems_own_words(tmp_path, place):
    data = read_dataset(tmp_path)
    (place / "0.png").unlink()
    assert faults_of(data) == {place / "0.png": "cannot be read (No such file or directory)"}


def ramp(mode):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    if mode == "I;16":
        return Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024)
    return grey.convert("RGB").convert(mode)


def transparent_palette(path):
    image = ramp("P")
    image.save(path, transparency=bytes(range(0, 256, 8)))


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(path, exif=exif)


ACCEPTED = {
    "cmyk.jpg": lambda path: ramp("CMYK").save(path),
    "grey16.png": lambda path: ramp("I;16").save(path),
    "grey16.tif": lambda path: ramp("I;16").save(path),
    "palette.png": lambda path: ramp("P").save(path),
    "clear palette.png": transparent_palette,
    "grey.jpg": lambda path: ramp("L").save(path),
    "grey alpha.png": lambda path: ramp("LA").save(path),
    "bits.png": lambda path: ramp("1").save(path),
    "rgba.png": lambda path: ramp("RGBA").save(path),
    "turned.jpg": turned,
    "camera.jpg": frames("MPO", 2),
    "animated.png": frames("PNG", 3),
    "animated.webp": frames("WEBP", 2),
    "gif named.jpg": frames("GIF", 2),
    "png named.jpg": lambda path: ramp("RGB").save(path, "PNG"),
    "least.png": lambda path: Image.new("RGB", (2, 2)).save(path),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_decode_converts_is_accepted(tmp_path, place, name):
    ACCEPTED[name](place / name)
    assert problems_of(read_dataset(tmp_path)) == []
    assert decode(place / name).shape[0] == 3


def test_images_are_tracked_one_by_one_and_each_file_once(tmp_path):
    write_images(tmp_path, *GOOD, "copies/original/200000.png", "copies/strong/200001.png")
    tracked = []

    def progress(items, title, length):
        tracked.append((title, length))
        for item in items:
            tracked.append(item)
            yield item

    assert problems_of(read_dataset(tmp_path), progress) == []
    assert tracked[0] == ("checking images", 5)
    assert len(tracked) == 6


def test_more_images_than_are_handed_out_at_once_are_all_looked_at(tmp_path):
    write_images(tmp_path, *GOOD)
    for number in range(AHEAD + 2):
        (tmp_path / "train/a" / f"x{number:05d}.png").write_bytes(b"" if number > AHEAD - 5 else b"text")
    found = faults_of(read_dataset(tmp_path))
    assert list(found) == sorted(found)
    assert len(found) == AHEAD + 2
    assert sum(fault == "is empty" for fault in found.values()) == 6

"""Small pictures of a page: upright, on white, never larger than asked for, and none of what may not be opened."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from grainmill.corpus.thumbnails import SIDE, Thumbnail


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def shown(content):
    """Decode a thumbnail: its pixels (H, W, 3)."""
    with Image.open(io.BytesIO(base64.b64decode(Thumbnail(content, "name").jpeg))) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_is_upright_and_small(kind):
    stored, tag = np.zeros((400, 800, 3), np.uint8), Image.Exif()
    stored[:, :400] = 255  # the left half, which is the upper half when turned clockwise
    tag[0x0112] = 6
    pixels = shown(encoded(Image.fromarray(stored), kind, exif=tag))
    assert pixels.shape == (SIDE, SIDE // 2, 3)
    assert pixels[: SIDE // 2 - 8].min() > 240
    assert pixels[SIDE // 2 + 8 :].max() < 15


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (Image.new("RGBA", (8, 8), (9, 9, 9, 0)), 255),
        (Image.new("LA", (8, 8), (0, 51)), 204),
        (Image.new("L", (8, 8), 77), 77),
        (Image.new("1", (8, 8), 1), 255),
        (Image.fromarray(np.full((8, 8), 4095, np.uint16)), 255),
        (Image.fromarray(np.zeros((8, 8), np.uint16)), 0),
    ],
)
def test_every_kind_is_seen(image, value):
    assert np.abs(shown(encoded(image)) - value).max() <= 2


def test_fractions_are_seen():
    image = Image.fromarray(np.full((8, 8), 0.5, np.float32))
    assert shown(encoded(image, "TIFF")).min() > 250


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"text",
        b"P5 13000 13000 255\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        encoded(Image.new("RGB", (8, 8)), "TGA"),
    ],
)
def test_what_is_too_large_or_not_read_leaves_its_frame_empty(content):
    assert Thumbnail(content, "name").jpeg is None

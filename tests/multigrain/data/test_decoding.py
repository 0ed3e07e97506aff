"""Image files of many kinds become the pixels that people see, in both readers; limits hold before decoding."""

import io
import os
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multigrain.data import decoding
from multigrain.data.loading import decode
from multigrain.export.export import program_text

GREEN = (10, 200, 30)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(depth, colour, row, *chunks, late=(), height=1, width=None):
    """PNG of equal rows, given as bytes, with chunks before the pixels and after them."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width or len(row) * 8 // (depth * channels), height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, data, *late, chunk(b"IEND", b"")])


def tiff(row, bits, photometric, *more, order="<", width=None):
    """TIFF of one uncompressed row; `more` are further entries (tag, value)."""
    bits = bits if isinstance(bits, tuple) else (bits,)
    width = width or len(row) * 8 // sum(bits)
    entries = {
        256: width,
        257: 1,
        258: bits,
        259: 1,
        262: photometric,
        277: len(bits),
        278: 1,
        279: len(row),
        **dict(more),
    }
    after = 8 + 2 + 12 * (len(entries) + 1) + 4
    depths = struct.pack(f"{order}{len(bits)}H", *bits)
    entries[273] = after + len(depths)
    found = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    for tag, value in sorted(entries.items()):
        found += struct.pack(f"{order}HHI", tag, *((3, len(value)) if isinstance(value, tuple) else (4, 1)))
        if not isinstance(value, tuple):
            found += struct.pack(f"{order}I", value)
        else:
            found += depths.ljust(4, b"\0") if len(depths) <= 4 else struct.pack(f"{order}I", after)
    return found + bytes(4) + depths + row


def encoded(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def grey(*values, dtype=np.uint16):
    return Image.fromarray(np.array([values], dtype))


def flat(mode, colour, size=(4, 3)):
    return Image.new(mode, size, colour)


def palette(entries):
    image = Image.new("P", (len(entries), 1))
    image.putpalette(sum(entries, ()))
    image.putdata(range(len(entries)))
    return image


def frames(kind, *colours, **settings):
    first, *rest = (Image.new("RGB", (2, 2), colour) for colour in colours)
    return encoded(first, kind, save_all=True, append_images=rest, **settings)


RGB16 = struct.pack(">6H", 0x0A00, 0xC8FF, 0x1E80, 0x0A00, 0xC800, 0x1E00)
TWO = [(200, 100, 50), GREEN]

# Content, and the values of each row. An alpha of 51 is a fifth: value v becomes 255 - (255 - v) / 5.
KINDS = {
    "1 bit": (png(1, 0, b"\x50", width=4), [0, 255, 0, 255]),
    "2 bits": (png(2, 0, b"\x1b"), [0, 85, 170, 255]),
    "4 bits": (png(4, 0, b"\x0f\x80", width=3), [0, 255, 136]),
    "8 bits": (png(8, 0, b"\x00\x07\xff"), [0, 7, 255]),
    "16 bits": (png(16, 0, struct.pack(">3H", 0x00FF, 0x8001, 0xFF7F)), [0, 128, 255]),
    "14 in 16 bits": (png(16, 0, struct.pack(">3H", 0, 8192, 16383)), [0, 128, 255]),
    "12 in 16 bits": (png(16, 0, struct.pack(">4H", 0, 1000, 2048, 4095)), [0, 62, 128, 255]),
    "10 in 16 bits": (png(16, 0, struct.pack(">3H", 4, 512, 1023)), [1, 128, 255]),
    "8 in 16 bits": (png(16, 0, struct.pack(">3H", 1, 128, 255)), [1, 128, 255]),
    "16 bits of nothing": (png(16, 0, bytes(4)), [0, 0]),
    "16 bits, TIFF": (tiff(struct.pack("<3H", 0x00FF, 0x8001, 0xFF7F), 16, 1), [0, 128, 255]),
    "16 bits, big-endian TIFF": (tiff(struct.pack(">2H", 0x8001, 0xFF7F), 16, 1, order=">"), [128, 255]),
    "16 bits, 0 is white": (tiff(struct.pack("<3H", 0, 0x8001, 0xFFFF), 16, 0), [255, 127, 0]),
    "12 in 16 bits, TIFF": (encoded(grey(0, 1000, 4095), "TIFF"), [0, 62, 255]),
    "12 bits, TIFF": (tiff(bytes([0x0F, 0x10, 0x80]), 12, 1), [0x0F, 8]),  # of values 0x0F1 and 0x080
    "16 bits, PGM": (b"P5 3 1 65535\n" + struct.pack(">3H", 0, 0x8001, 0xFFFF), [0, 128, 255]),
    "12 in 16 bits, PGM": (b"P5 3 1 65535\n" + struct.pack(">3H", 0, 2048, 4095), [0, 128, 255]),
    "12 bits, PGM": (b"P5 3 1 4095\n" + struct.pack(">3H", 0, 1024, 4095), [0, 64, 255]),
    "16 bits, colour": (png(16, 2, RGB16), [GREEN, GREEN]),
    "16 bits, colour, TIFF": (tiff(struct.pack("<3H", 0x0A00, 0xC8FF, 0x1E80), (16, 16, 16), 2), [GREEN]),
    "alpha": (
        png(8, 6, bytes([200, 100, 50, 0, 200, 100, 50, 51, 200, 100, 50, 255])),
        [(255,) * 3, (244, 224, 214), (200, 100, 50)],
    ),
    "alpha, 16 bits": (png(16, 6, struct.pack(">8H", *[51400, 25700, 12850, 13107] * 2)), [(244, 224, 214)] * 2),
    "alpha, WebP": (encoded(flat("RGBA", (200, 100, 50, 51)), "WEBP", lossless=True), [(244, 224, 214)] * 4),
    "alpha, TIFF": (encoded(flat("RGBA", (200, 100, 50, 51)), "TIFF"), [(244, 224, 214)] * 4),
    "multiplied alpha, TIFF": (tiff(bytes([40, 20, 10, 51]), (8,) * 4, 2, (338, 1)), [(244, 224, 214)]),
    "multiplied grey alpha, TIFF": (tiff(bytes([40, 51]), (8, 8), 1, (338, 1)), [244]),
    "fourth channel of no meaning, TIFF": (tiff(bytes([*GREEN, 0]), (8,) * 4, 2, (338, 0)), [GREEN]),
    "opaque alpha": (encoded(flat("RGBA", (*GREEN, 255)), "PNG"), [GREEN] * 4),
    "grey alpha": (png(8, 4, bytes([77, 0, 77, 51, 77, 255])), [255, 219, 77]),
    "grey alpha, 16 bits": (png(16, 4, struct.pack(">4H", 77 << 8, 13107, 77 << 8, 65535)), [219, 77]),
    "colour key": (
        png(8, 2, bytes([*GREEN, 10, 200, 31]), chunk(b"tRNS", struct.pack(">3H", *GREEN))),
        [(255,) * 3, (10, 200, 31)],
    ),
    "colour key, 16 bits": (png(16, 2, RGB16[6:], chunk(b"tRNS", RGB16[6:])), [(255,) * 3]),
    "grey key": (png(8, 0, b"\x07\x08", chunk(b"tRNS", b"\0\x07")), [255, 8]),
    "grey key, 1 bit": (png(1, 0, b"\x40", chunk(b"tRNS", b"\0\0"), width=2), [255, 255]),
    "grey key, 2 bits": (png(2, 0, b"\x1b", chunk(b"tRNS", b"\0\x01")), [0, 255, 170, 255]),
    "grey key, 4 bits": (png(4, 0, b"\x0f\x80", chunk(b"tRNS", b"\0\x08"), width=3), [0, 255, 255]),
    "grey key, 16 bits": (
        png(16, 0, struct.pack(">2H", 2570, 40000), chunk(b"tRNS", struct.pack(">H", 2570))),
        [255, 156],
    ),
    "palette": (encoded(palette(TWO), "PNG"), TWO),
    "palette with one clear colour": (encoded(palette(TWO), "PNG", transparency=0), [(255,) * 3, GREEN]),
    "palette with alpha": (encoded(palette(TWO), "PNG", transparency=bytes([51, 255])), [(244, 224, 214), GREEN]),
    "palette with a clear colour, GIF": (encoded(palette(TWO), "GIF", transparency=0), [(255,) * 3, GREEN]),
    "GIF of frames": (frames("GIF", GREEN, (0, 0, 0)), [GREEN] * 2),
    "PNG of frames": (frames("PNG", GREEN, (0, 0, 0)), [GREEN] * 2),
    "WebP of frames": (frames("WEBP", GREEN, (0, 0, 0), lossless=True), [GREEN] * 2),
    "JPEG of frames": (frames("MPO", (77, 77, 77), (0, 0, 0)), [77] * 2),
    "print": (encoded(flat("CMYK", (0, 255, 255, 0)), "TIFF"), [(255, 0, 0)] * 4),
    "print with black": (encoded(flat("CMYK", (51, 0, 102, 51)), "TIFF"), [(163, 204, 122)] * 4),
    "print, JPEG": (encoded(flat("CMYK", (0, 0, 0, 155)), "JPEG", quality=100), [100] * 4),
    "BMP": (encoded(flat("RGB", GREEN), "BMP"), [GREEN] * 4),
    "PPM": (b"P6 1 1 255\n" + bytes(GREEN), [GREEN]),
    "PBM": (b"P4 2 1\n\x40", [255, 0]),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Names of an exported model's reader."""
    names = {"__name__": "model"}
    exec(compile(program_text(), "model.py", "exec"), names)
    return names


def by_export(names, content, upright=True):
    with names["opened"](content) as image:
        return names["pixels"](image, upright)


def by_training(content, upright=True):
    return decode(io.BytesIO(content), upright).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_file_has_the_pixels_that_people_see_in_both_readers(exported, kind):
    content, expected = KINDS[kind]
    row = [list(value) if isinstance(value, tuple) else [value] * 3 for value in expected]
    for pixels in (by_training(content), by_export(exported, content)):
        assert pixels.dtype == np.uint8
        assert pixels.tolist() == [row] * len(pixels)


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_opaque_alpha_changes_no_bit():
    image = noise((9, 7))
    content = encoded(Image.fromarray(image).convert("RGBA"), "PNG")
    np.testing.assert_array_equal(by_training(content), image)


def test_alpha_is_laid_on_white_and_rounded_to_the_nearest():
    colours, alphas = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([colours] * 3 + [alphas], axis=2).astype(np.uint8)
    expected = np.floor((colours * alphas + 255 * (255 - alphas)) / 255 + 0.5)
    np.testing.assert_array_equal(by_training(encoded(Image.fromarray(rgba), "PNG"))[:, :, 1], expected)


def test_a_bitmap_whose_fourth_byte_is_empty_is_opaque():
    content = bytearray(encoded(flat("RGBA", (*GREEN, 0), (1, 1)), "BMP"))
    assert by_training(bytes(content)).tolist() == [[list(GREEN)]]


def exif_of(value, order=">", kind=3):
    head = b"Exif\0\0" + (b"MM\0*" if order == ">" else b"II*\0")
    return head + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, kind, 1, value, 0, 0)


# Four coloured quarters, as letters: where they are on the screen for each value of the tag (EXIF 2.3, tag 0x0112).
STORED = ["ab", "cd"]
SEEN = {
    1: ["ab", "cd"],
    2: ["ba", "dc"],
    3: ["dc", "ba"],
    4: ["cd", "ab"],
    5: ["ac", "bd"],
    6: ["ca", "db"],
    7: ["db", "ca"],
    8: ["bd", "ac"],
}
COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255), "d": (255, 255, 255)}


def quarters(letters, height, width):
    """Image (height, width, 3) of four quarters."""
    rows = np.array([[COLOURS[letter] for letter in row] for row in letters], np.uint8)
    return rows.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


@pytest.mark.parametrize("value", [*SEEN, 0, 9, 65535])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_orientation_of_a_camera_is_followed_or_left_in_every_format(exported, tmp_path, kind, value):
    settings = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    tag = Image.Exif()
    tag[0x0112] = value
    content = encoded(Image.fromarray(quarters(STORED, 32, 64)), kind, exif=tag, **settings)
    seen = SEEN.get(value, STORED)
    for upright, letters in ((True, seen), (False, STORED)):
        turned = upright and 5 <= value <= 8
        expected = quarters(letters, *((64, 32) if turned else (32, 64)))
        with decoding.opened(content) as image:
            assert decoding.shape(image, upright) == expected.shape[:2]
        for pixels in (by_training(content, upright), by_export(exported, content, upright)):
            assert pixels.shape == expected.shape
            assert np.abs(pixels.astype(int) - expected).mean() < 16  # a loss of AVIF and JPEG at the edges


EXIF6 = exif_of(6)


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (exif_of(6), True),
        (exif_of(6, "<"), True),
        (exif_of(0), False),
        (exif_of(9), False),
        (EXIF6[:14], False),
        (EXIF6[:20], False),
        (b"Exif\0\0", False),
        (b"Exif\0\0II*\0\xff\xff\xff\xff", False),
        (b"Exif\0\0" + bytes(range(60)), False),
        (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\0" * 40, False),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_orientation_is_left(exif, turned):
    for kind in ("JPEG", "WEBP"):
        content = encoded(flat("RGB", GREEN, (4, 2)), kind, exif=exif)
        assert by_training(content).shape == ((4, 2, 3) if turned else (2, 4, 3))


@pytest.mark.parametrize("late", [False, True])
def test_the_orientation_of_a_png_may_follow_its_pixels(late):
    tag = [chunk(b"eXIf", EXIF6[6:])]
    content = png(8, 0, b"\x01\x02", *([] if late else tag), late=tag if late else ())
    with decoding.opened(content) as image:
        assert decoding.shape(image, True) == (2, 1)
        assert decoding.shape(image, False) == (1, 2)
    assert by_training(content)[:, :, 0].tolist() == [[1], [2]]
    assert by_training(content, upright=False)[:, :, 0].tolist() == [[1, 2]]


REFUSED = {
    "32-bit numbers": (encoded(grey(0, 7, 70000, dtype=np.int32), "TIFF"), "holds signed numbers"),
    "signed numbers": (tiff(struct.pack("<h", -5), 16, 1, (339, 2)), "holds signed numbers"),
    "signed bytes": (tiff(b"\xfb", 8, 1, (339, 2)), "holds signed numbers"),
    "unsigned 32-bit numbers": (tiff(struct.pack("<I", 70000), 32, 1), "holds 32-bit numbers"),
    "fractions": (encoded(grey(0, 0.5, 1, dtype=np.float32), "TIFF"), "holds floating-point numbers"),
    "fractions, PFM": (b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5), "holds floating-point numbers"),
    "CIELAB": (encoded(flat("LAB", (128, 3, 4)), "TIFF"), "holds CIELAB colours"),
    "dark 16-bit colour": (png(16, 2, struct.pack(">3H", 1, 2, 4095)), "no value above 4,095"),
    "dark 16-bit colour with alpha": (png(16, 6, struct.pack(">4H", 1, 2, 4095, 9)), "no value above 4,095"),
    "pages": (frames("TIFF", GREEN, GREEN), "has several pages"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "of a format that is read"),
    "JPEG 2000": (encoded(flat("RGB", GREEN), "JPEG2000"), "of a format that is read"),
    "Targa": (encoded(flat("RGB", GREEN), "TGA"), "of a format that is read"),
    "icon": (encoded(flat("RGB", GREEN), "ICO"), "of a format that is read"),
    "text": (b"see you later", "of a format that is read"),
    "nothing": (b"", "is empty"),
    "web page": (b"\n<!DOCTYPE html>\n<title>404</title>", "is a web page"),
    "cut": (encoded(Image.fromarray(noise((40, 40))), "JPEG")[:-200], "is cut short or damaged"),
    "header": (b"\x89PNG\r\n\x1a\n" + bytes(30), "is cut short, damaged, or a kind of PNG that is not read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_right_is_refused_with_the_reason_by_both_readers(exported, kind):
    content, reason = REFUSED[kind]
    with pytest.raises(Exception, match=r".") as by_one:
        by_training(content)
    with pytest.raises(Exception, match=r".") as by_other:
        by_export(exported, content)
    assert reason in decoding.fault(by_one.value)
    assert decoding.fault(by_one.value) == exported["fault"](by_other.value)


def riff(width, height):
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    pixels = encoded(flat("RGB", GREEN), "WEBP", lossless=True)[12:]
    content = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + pixels
    return b"RIFF" + struct.pack("<I", len(content)) + content


def headed(content, place, form, *sides):
    return content[:place] + struct.pack(form, *sides) + content[place + struct.calcsize(form) :]


SIDE = 13_000


def bombs():
    row = bytes(8)
    one = encoded(flat("RGB", GREEN), "JPEG")
    gif = encoded(flat("P", 0), "GIF")
    small = png(8, 0, b"\x01\x02")
    texts = {
        "compressed text": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000))),
        "compressed international text": chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x" * 100_000_000)),
    }
    sized = {
        "PNG": headed(small, 16, ">II", SIDE, SIDE)[:29] + struct.pack(">I", 0) + small[33:],
        "JPEG": headed(one, one.index(struct.pack(">HH", 3, 4)), ">HH", SIDE, SIDE),
        "GIF": headed(gif, 6, "<HH", SIDE, SIDE),
        "BMP": headed(encoded(flat("RGB", GREEN), "BMP"), 18, "<ii", SIDE, SIDE),
        "TIFF": tiff(row, 8, 1, (257, SIDE), width=SIDE),
        "PPM": b"P5 13000 13000 255\n",
    }
    sized["PNG"] = sized["PNG"][:29] + struct.pack(">I", zlib.crc32(sized["PNG"][12:29])) + sized["PNG"][33:]
    return {
        **{
            name: (content, "is 13,000 x 13,000 pixels, but at most 89,478,485 are read")
            for name, content in sized.items()
        },
        "larger PNG": (headed(small, 16, ">II", 60_000, 60_000), "cut short, damaged"),
        "rows of millions": (
            tiff(row, 8, 1, (257, 2), width=2**24),
            "is 16,777,216 x 2 pixels, but at most 65,535 each way",
        ),
        "PPM that is scaled": (b"P5 1100 1100 254\n", "is a large PPM"),
        "WebP": (riff(16_000, 16_000), "has more than 89,478,485 pixels"),
        "tiles": (tiff(row, 8, 1, (322, 26_000), (323, 26_000), (324, 8), (325, 8)), "has tiles of more than"),
        **{name: (small[:33] + text + small[33:], "holds texts that are too large") for name, text in texts.items()},
        **{f"late {name}": (small[:-12] + text + small[-12:], "holds texts that are") for name, text in texts.items()},
    }


BOMBS = bombs()


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_asks_for_much_memory_is_refused_before_it_is_decoded(exported, kind):
    content, reason = BOMBS[kind]
    assert len(content) < 200_000
    tracemalloc.start()
    try:
        for reader in (by_training, lambda content: by_export(exported, content)):
            with pytest.raises(Exception, match=r".") as caught:
                reader(content)
            assert reason in decoding.fault(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_large_images_are_decoded_one_after_the_other_and_small_ones_beside_them(monkeypatch):
    large, small = (encoded(Image.new("L", (side, side)), "PNG") for side in (1100, 8))
    monkeypatch.setattr(decoding, "AT_ONCE", 2 * 1100**2)
    with ThreadPoolExecutor(1) as thread, decoding.opened(large):
        with decoding.opened(large):
            third = thread.submit(by_training, large)
            assert by_training(small).shape == (8, 8, 3)
            assert not third.done()
        assert third.result().shape == (1100, 1100, 3)
    assert decoding._pixels_at_once == [0]


def test_of_a_thousand_frames_one_is_decoded():
    images = [Image.new("L", (8, 8), number % 256) for number in range(1000)]
    content = encoded(images[7], "GIF", save_all=True, append_images=images)
    assert np.unique(by_training(content)).tolist() == [7]


def test_a_file_of_many_bytes_is_not_read(tmp_path, exported):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(decoding.MOST_BYTES + 1)
    with pytest.raises(decoding.ImageError, match="has more than 268,435,456 bytes"):
        decode(tmp_path / "large.png")
    with pytest.raises(ValueError, match="has more than 268,435,456 bytes"):
        by_export(exported, tmp_path / "large.png")


def test_a_pipe_is_not_waited_for(tmp_path, exported):
    os.mkfifo(tmp_path / "pipe.png")
    for reader in (decode, lambda path: by_export(exported, path)):
        with pytest.raises(ValueError, match="is no regular file"):
            reader(tmp_path / "pipe.png")


def test_a_string_is_no_image(exported):
    with pytest.raises(ValueError, match=r"must be bytes, a pathlib\.Path or an array of uint8, not str"):
        by_export(exported, "/etc/passwd")


@pytest.mark.parametrize("source", [bytes, bytearray, memoryview])
def test_bytes_of_each_type_are_read(exported, source):
    assert by_export(exported, source(KINDS["PPM"][0])).tolist() == [[list(GREEN)]]


def test_the_exported_reader_imports_nothing_of_ours():
    lines = program_text().splitlines()
    assert [line for line in lines if "multigrain" in line and "import " in line] == []
    assert Path(decoding.__file__).read_text() in program_text()


def test_a_photo_of_a_phone_in_heic_is_upright():
    pillow_heif = pytest.importorskip("pillow_heif")
    tag, buffer = Image.Exif(), io.BytesIO()
    tag[0x0112] = 6
    photo = pillow_heif.from_pillow(Image.fromarray(quarters(STORED, 64, 128)))
    photo.save(buffer, quality=95, exif=tag.tobytes())
    pixels = by_training(buffer.getvalue())
    assert np.abs(pixels.astype(int) - quarters(SEEN[6], 128, 64)).mean() < 16


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"longer"), os.utime])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, change):
    path = tmp_path / "a.png"
    path.write_bytes(b"short")
    assert decoding.read_file(path) == b"short"
    monkeypatch.setattr(decoding, "_check_bytes", lambda _: change(path))
    with pytest.raises(decoding.ImageError, match="changed while it was read"):
        decoding.read_file(path)

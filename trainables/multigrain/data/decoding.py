"""Decoding of image files to RGB: formats, limits, orientation, transparency and bit depth.

Training, evaluation, checks and exported models all decode by this module. It needs NumPy and Pillow only, because
`export` writes its text into the `model.py` of every exported model.
"""

import io
import logging
import os
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin, _imaging

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "HEIF")
"""Formats that are opened at all, by Pillow's names; HEIF needs `pillow-heif`."""
MOST_PIXELS = 2**28 // 3
"""Largest number of pixels of an image, 89,478,485 (Pillow's own limit), and of the image scaled for the network."""
MOST_SIDE = 2**16 - 1
"""Largest width and height; Pillow takes minutes for rows of millions of pixels."""
MOST_BYTES = 2**28
"""Largest size of an image file, 268,435,456 bytes."""
AT_ONCE = 2**27
"""Largest number of pixels that the threads of a process decode at once; each takes ten to twenty bytes."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""Image (H, W, 3), RGB."""

_decoding, _SMALL = threading.Condition(), 2**20
_pixels_at_once = [0]  # of images that are not small
_KNOWN = "JPEG, PNG, WebP, GIF, TIFF, BMP, PPM, AVIF, and HEIC with pillow-heif"
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B"}
_REFUSED = {"I": "32-bit numbers", "F": "floating-point numbers", "LAB": "CIELAB colours"}
_DEPTHS = (8, 10, 12, 14, 16)
_ORIENTATION, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH, _SAMPLE_FORMAT = 274, 262, 322, 323, 339  # tags of TIFF and EXIF


class ImageError(ValueError):
    """Reason why a file is no usable image: the predicate of a sentence, such as `is empty`."""


def fault(error: Exception) -> str:
    """Return the predicate of a sentence on a file that could not be decoded because of an error."""
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"has more than {MOST_PIXELS:,} pixels, the most that are read"
    if "MAX_TEXT" in str(error):  # Pillow's limits for the texts in a PNG
        return "holds texts that are too large to be read"
    return f"is cut short or damaged ({str(error) or type(error).__name__})"


def read_file(file: Path | IO[bytes]) -> bytes:
    """Read a file whole. Raises ImageError if it is larger than `MOST_BYTES`, no regular file, or being written."""
    if isinstance(file, Path):
        with _open_file(file) as opened_file:
            before = os.fstat(opened_file.fileno())
            content = read_file(opened_file)
            after = os.fstat(opened_file.fileno())
        if (before.st_mtime_ns, len(content)) != (after.st_mtime_ns, after.st_size):
            raise ImageError("changed while it was read")
        return content
    content = file.read(MOST_BYTES + 1)
    _check_bytes(len(content))
    return content


def _open_file(path: Path) -> IO[bytes]:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for its writer
        raise ImageError("is no regular file")
    _check_bytes(found.st_size)
    return path.open("rb")


def _check_bytes(count: int) -> None:
    if count > MOST_BYTES:
        raise ImageError(f"has more than {MOST_BYTES:,} bytes, the most that are read")


@contextmanager
def opened(source: Any) -> Iterator[ImageFile.ImageFile]:
    """Open a path or the content of an image file, from its header, and refuse what is beyond the limits.

    A string is refused, too: in a service, it would let any client name a file of this machine.

    Raises:
        ImageError: it is not an image, or not one of the kinds that are read.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        _check_bytes(len(source))
        file: IO[bytes] = io.BytesIO(source)
    elif isinstance(source, os.PathLike):
        file = _open_file(Path(source))
    else:
        raise ImageError(f"must be bytes, a pathlib.Path or an array of uint8, not {type(source).__name__}")
    with file, _identified(file) as image:
        _check(image)
        if image.width * image.height <= _SMALL:
            yield image
        else:
            with _turn_to_decode(image.width * image.height):
                yield image


@contextmanager
def _turn_to_decode(count: int) -> Iterator[None]:
    """Wait until an image of `count` pixels can be decoded beside the others."""
    with _decoding:
        _decoding.wait_for(lambda: _pixels_at_once[0] + count <= AT_ONCE)
        _pixels_at_once[0] += count
    try:
        yield
    finally:
        with _decoding:
            _pixels_at_once[0] -= count
            _decoding.notify_all()


def _identified(file: IO[bytes]) -> ImageFile.ImageFile:
    """Open a file by its first bytes.

    `Image.open` would answer a large image with a warning that names no file, before its size can be looked at.
    """
    head = file.read(1024)
    _begin()
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or (accept is not None and accept(head[:16]) is not True):
            continue
        exif = _png_exif(file) if name == "PNG" else None
        file.seek(0)
        try:
            image = factory(file, "")
        except SyntaxError as error:  # Pillow's word for a header that it does not understand
            raise ImageError(f"is cut short, damaged, or a kind of {name} that is not read ({error})") from error
        if exif is not None:
            image.info["exif"] = exif
        return image
    if not head:
        raise ImageError("is empty")
    if b"<html" in head.lower() or b"<!doctype html" in head.lower():
        raise ImageError("is a web page, not an image")
    raise ImageError(f"is not an image of a format that is read ({_KNOWN}), or its first bytes are damaged")


@cache
def _begin() -> None:
    """Load Pillow's formats and HEIF, and silence its words on damaged files, which name no file."""
    Image.init()
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    _imaging.set_block_size(2**26)  # blocks below 2**25 bytes stay with the thread that has freed them
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _png_exif(file: IO[bytes]) -> bytes | None:
    """Find the EXIF data of a PNG, which may follow the pixels; Pillow finds those when it decodes."""
    file.seek(8)
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"eXIf":
            return file.read(length)
        file.seek(length + 4, os.SEEK_CUR)
    return None


def _check(image: ImageFile.ImageFile) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ImageError(f"is {width:,} x {height:,} pixels, but at most {MOST_PIXELS:,} are read")
    if max(image.size) > MOST_SIDE:
        raise ImageError(f"is {width:,} x {height:,} pixels, but at most {MOST_SIDE:,} each way are read")
    if image.format == "PPM" and image.tile[0][0] != "raw" and width * height > _SMALL:
        raise ImageError("is a large PPM with a largest value other than 255 and 65,535; save it as PNG")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if 2 in np.atleast_1d(image.tag_v2.get(_SAMPLE_FORMAT, 1)):
            _refuse("signed numbers")
        if image.is_animated:
            raise ImageError("has several pages, and which one is meant is not known; save that page alone")
        if image.tag_v2.get(_TILE_WIDTH, 1) * image.tag_v2.get(_TILE_LENGTH, 1) > MOST_PIXELS:
            raise ImageError(f"has tiles of more than {MOST_PIXELS:,} pixels, the most that are read")
        image.info.pop("xmp", None)  # Pillow would also turn the image as that says
    if image.mode not in _MODES and not (image.mode == "I" and image.format == "PPM"):
        _refuse(_REFUSED.get(image.mode, f"pixels of the kind {image.mode}"))


def _refuse(numbers: str) -> None:
    raise ImageError(f"holds {numbers}, which are not read; save it as grey or RGB of 8 or 16 bits a channel")


def orientation(image: ImageFile.ImageFile, upright: bool) -> int:
    """Return the orientation, from 1 (none) to 8, that an opened image still needs after Pillow has decoded it.

    A value that EXIF does not define, and EXIF data that are damaged, count as 1.

    Args:
        image: result of `opened`, not decoded yet.
        upright: whether the image is wanted as its EXIF orientation says, else as stored.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # which Pillow turns itself
        stored = 1 if upright else image.tag_v2.get(_ORIENTATION, 1)
        value = {6: 8, 8: 6}.get(stored, stored)
    elif upright and (exif := image.info.get("exif")):
        value = _exif_orientation(exif)
    else:
        return 1
    return value if value in range(1, 9) else 1


def _exif_orientation(exif: bytes) -> int:
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "=")
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, place)
            if tag == _ORIENTATION:
                return int(value)
    except struct.error:
        pass
    return 1


def oriented(image: Pixels, orientation: int) -> Pixels:
    """Turn and mirror pixels as an EXIF orientation says, from 1 to 8."""
    if orientation == 1:
        return image
    rows, columns = orientation in {3, 4, 7, 8}, orientation in {2, 3, 6, 7}
    image = image.transpose(1, 0, 2) if orientation > 4 else image
    return image[:: -1 if rows else 1, :: -1 if columns else 1].copy()


def shape(image: ImageFile.ImageFile, upright: bool) -> tuple[int, int]:
    """Return height and width of `pixels`, without decoding."""
    return image.size if orientation(image, upright) > 4 else image.size[::-1]


def pixels(image: ImageFile.ImageFile, upright: bool) -> Pixels:
    """Decode an opened image, of an animation the first frame, as RGB.

    Transparency is laid on white. Of 16 bits, the upper eight are kept. A grey image that needs fewer bits than its
    file has is read as one of 8, 10, 12 or 14 bits, the fewest that hold its largest value.

    Args:
        image: result of `opened`, not decoded yet.
        upright: whether the image is turned and mirrored as its EXIF orientation says, else it is as stored.
    Raises:
        ImageError: the depth of the values is not known.
    """
    turn, layout = orientation(image, upright), _layout(image)
    if image.mode.startswith("I"):
        return oriented(_grey(image, layout), turn)
    if image.format == "PNG" and "transparency" in image.info:
        image.info["transparency"] = _eight_bits(image.info["transparency"], layout)
    if ";16" in layout and image.mode.startswith("RGB") and max(high for _, high in _extrema(image)[:3]) < 16:
        raise ImageError(
            "has 16 bits for each channel, but no value above 4,095, so that its depth is not known; "
            "save it with 8 bits, or scale the values to 16"
        )
    return oriented(np.array(_on_white(image)), turn)


def _layout(image: ImageFile.ImageFile) -> str:
    """Return Pillow's name of the layout of samples in a PNG or TIFF, such as `RGB;16B`."""
    settings = image.tile[0][3] if image.tile else ""
    return str(settings[0]) if isinstance(settings, tuple | list) else str(settings)


def _grey(image: ImageFile.ImageFile, layout: str) -> Pixels:
    """Decode 16-bit grey."""
    values = np.asarray(image)
    bits = next(bits for bits in _DEPTHS if values.max() < 1 << bits)
    if layout == "I;12":
        bits = 12
    elif image.mode == "I" and layout != "I;16B":  # a PPM that states its largest value, to which Pillow has scaled
        bits = 16
    grey = (values >> bits - 8).astype(np.uint8)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:  # 0 is white
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def _eight_bits(key: Any, layout: str) -> Any:
    """Scale the transparent colour of a PNG to the eight bits that Pillow decodes its channels to."""
    if ";16" in layout:
        return tuple(value >> 8 for value in key)
    factor = {"L;2": 85, "L;4": 17}.get(layout)
    return key * factor if factor else key


def _on_white(image: Image.Image) -> Image.Image:
    """Lay an image on white: alpha / 255 of its colour and the rest white, rounded to the nearest. Returns RGB."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    shown = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if image.format == "BMP" and _extrema(shown)[3] == (0, 0):  # many programs leave the fourth byte empty
        return shown.convert("RGB")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(shown, mask=shown)
    return canvas


def _extrema(image: Image.Image) -> Any:
    """Return the smallest and the largest value of each of several channels."""
    return image.getextrema()


def scaled_shape(height: int, width: int, side: int) -> tuple[int, int]:
    """Return height and width of an image whose smaller side is scaled to `side`, rounded down.

    Raises:
        ImageError: the image is so narrow that it would have more than `MOST_PIXELS`.
    """
    shorter = min(height, width)
    scaled = int(side * height / shorter), int(side * width / shorter)
    if scaled[0] * scaled[1] > MOST_PIXELS:
        raise ImageError(f"is {width:,} x {height:,} pixels, too narrow to be scaled to a smaller side of {side}")
    return scaled

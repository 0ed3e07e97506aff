"""Thumbnails page: one self-contained HTML file with rows of small pictures, by the template `thumbnails.html`."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image, ImageOps

SIDE = 160
"""Longest side of a thumbnail, in pixels."""
MOST_PIXELS = 2**28 // 3
"""Largest number of pixels of an image that is decoded, Pillow's own limit."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "HEIF")
"""Formats that are opened, by Pillow's names; above all no PostScript, which would run Ghostscript."""


class Thumbnail(NamedTuple):
    """A picture of the page and its caption."""

    content: bytes | None
    """Content of the image file; the frame stays empty for None or if the content is no image."""
    name: str
    note: str = ""
    query: bool = False
    """True for the picture of a query, which is framed."""

    @property
    def jpeg(self) -> str | None:
        """Small JPEG of the image in base64; None without an image."""
        if self.content is None:
            return None
        try:
            with Image.open(io.BytesIO(self.content), formats=FORMATS) as image:
                small = _small(image)
        except Exception:  # Pillow raises many types, and the page can do without this picture
            return None
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        return base64.b64encode(buffer.getvalue()).decode()


def _small(image: Image.Image) -> Image.Image:
    """Return a small version of an image as people see it: upright, and on white. Deep grey is scaled to its maximum.

    Raises:
        ValueError: the image has more than `MOST_PIXELS`.
    """
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"must have at most {MOST_PIXELS:,} pixels, got {image.width:,} x {image.height:,}")
    image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is then decoded at a fraction of its size
    upright = ImageOps.exif_transpose(image)
    if upright.mode[0] in "IF":
        values = np.asarray(upright, np.float32)
        upright = Image.fromarray((values.clip(0) * (255 / max(values.max(), 1e-9))).astype(np.uint8))
    small = upright.convert("RGBA")
    small.thumbnail((SIDE, SIDE))
    canvas = Image.new("RGB", small.size, "white")
    canvas.paste(small, mask=small)
    return canvas


def write_page(path: Path, title: str, summary: str, rows: Sequence[Sequence[Thumbnail]]) -> None:
    """Write the page, with the summary above the rows."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("thumbnails.html").render(title=title, summary=summary, rows=rows, side=SIDE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="replace")  # names of files are bytes, not always text

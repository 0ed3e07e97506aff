"""Thumbnails page: one self-contained HTML file with rows of small pictures, by the template `thumbnails.html`."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader
from PIL import Image

SIDE = 160
"""Longest side of a thumbnail, in pixels."""


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
            with Image.open(io.BytesIO(self.content)) as image:
                small = image.convert("RGB")
        except Exception:  # Pillow raises many types, and the page can do without this picture
            return None
        small.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        return base64.b64encode(buffer.getvalue()).decode()


def write_page(path: Path, title: str, summary: str, rows: Sequence[Sequence[Thumbnail]]) -> None:
    """Write the page, with the summary above the rows."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("thumbnails.html").render(title=title, summary=summary, rows=rows, side=SIDE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="replace")  # names of files are bytes, not always text

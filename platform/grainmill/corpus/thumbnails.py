"""One HTML page of pictures in rows, which needs no other file."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

SIDE = 160
"""Pixels of a thumbnail, at most."""

_STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:2em;max-width:1500px;color:#222}
.row{display:flex;flex-wrap:wrap;gap:10px;align-items:flex-start}
.row{margin:14px 0;border-top:1px solid #ddd;padding-top:14px}
figure{margin:0;width:160px;font-size:12px;overflow-wrap:anywhere}
.query{margin-right:20px}.query img,.query .none{outline:3px solid #3366aa}
img{display:block;max-width:160px;min-width:64px;image-rendering:auto}
.none{display:flex;width:160px;height:110px;background:#eee;color:#777;align-items:center;justify-content:center}"""


class Thumbnail(NamedTuple):
    """One picture, and what is said of it."""

    content: bytes | None
    """An image file; None, or what is no image, leaves an empty frame."""
    name: str
    note: str = ""
    query: bool = False


def write_page(path: Path, title: str, summary: str, rows: Sequence[Sequence[Thumbnail]]) -> None:
    """Write the page; what is summary goes above the rows."""
    shown = "".join(f"<div class=row>{''.join(map(_figure, row))}</div>" for row in rows)
    title, summary = html.escape(title), html.escape(summary)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{summary}</p>{shown}</html>",
        encoding="utf-8",
        errors="replace",  # names of files are bytes, not always text
    )


def _figure(cell: Thumbnail) -> str:
    caption = "<br>".join(html.escape(text) for text in (cell.note, cell.name) if text)
    shown = _thumbnail(cell.content, cell.name) or "<div class=none>no picture</div>"
    return f"<figure{' class=query' if cell.query else ''}>{shown}<figcaption>{caption}</figcaption></figure>"


def _thumbnail(content: bytes | None, name: str) -> str | None:
    if content is None:
        return None
    try:
        with Image.open(io.BytesIO(content)) as image:
            small = image.convert("RGB")
    except Exception:  # Pillow raises many types; a page is worth more than this picture
        return None
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    source = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{source}" alt="{html.escape(name)}">'

"""Picture: an image file, or a part of one, that a benchmark shows to the network."""

from pathlib import Path
from typing import NamedTuple


class Picture(NamedTuple):
    """A file with an optional crop and rotation."""

    path: Path
    box: tuple[float, float, float, float] | None = None
    """x1, y1, x2, y2 of the crop in pixels, before resizing, of the image as `upright` shows it; None for the whole."""
    turn: int = 0
    """Rotation in degrees clockwise: 0, 90, 180 or 270. Width and height change places at 90 and 270."""
    upright: bool = True
    """True if the image is first turned as its EXIF orientation says. Published protocols take it as stored."""

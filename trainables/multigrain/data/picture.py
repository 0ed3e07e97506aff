"""One image to show a network: a file, or a part of one."""

from pathlib import Path
from typing import NamedTuple


class Picture(NamedTuple):
    """One image as a benchmark shows it to the network."""

    path: Path
    box: tuple[float, float, float, float] | None = None
    """x1, y1, x2, y2 in pixels of the file: all that is shown; cropped before resizing."""
    turn: int = 0
    """Degrees clockwise, 0, 90, 180 or 270; the canvas turns with the image."""

"""Lists for spreadsheets: CSV files in which no name of a file is a formula."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from grainmill.storage import files

FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""Beginnings of cells that spreadsheets take for a formula: also the wide forms, and blanks that they drop."""


def safe_name(name: str) -> str:
    """Return a name of a file as it can stand in a cell: `./=name`, which is the same file, for `=name`."""
    return f"./{name}" if name.startswith(FORMULA) else name


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically, and its folder; texts in the rows are names of files or sentences."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([safe_name(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text.getvalue())

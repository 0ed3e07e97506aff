"""Copy-detection sets in folders: `original/`, `strong/` with the copies and, optionally, `distractors/`.

The original of a copy is told by their names, or by a file `copies.csv`.
"""

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from multigrain.data.dataset import CopySet
from multigrain.data.listing import Listing, list_by_folder
from multigrain.data.tables import read_rows
from multigrain.errors import DataError

PARTS = ("original", "strong", "distractors")
TABLE = "copies.csv"
"""File that names the original of each copy, with the columns `COLUMNS`, relative to its folder."""
COLUMNS = ("copy", "original")
BLOCK = 4
"""Number of digits that name the original image in a Copydays file name."""


def read_copies(root: Path) -> tuple[CopySet, Listing]:
    """List a folder of originals and copies; also return the listing with what is left out.

    The queries are the strong copies, as in the paper; the database is the originals and the distractors.

    Raises:
        DataError: a folder is missing or empty, or it is not clear which original a copy has.
    """
    found, listing = list_by_folder(root, PARTS)
    originals, strong, distractors = found.values()
    problems = [
        f"a copy-detection set needs images in {root / name}, found none" for name in PARTS[:2] if not found[name]
    ]
    if problems:
        raise DataError(problems)
    place = {path: index for index, path in enumerate(originals)}
    paired = _by_table(root, originals, strong) if (root / TABLE).is_file() else by_name(originals, strong)
    truth = tuple(place[paired[path]] for path in strong)
    return CopySet((*originals, *distractors), tuple(strong), truth), listing


def by_name(originals: Sequence[Path], copies: Sequence[Path]) -> dict[Path, Path]:
    """Map each copy to its original by their names without suffix.

    In INRIA Copydays, originals are `NNNN00` and copies `NNNNkk`. Otherwise the original is the one with the longest
    name that the copy's name begins with, where no word and no number is cut: `IMG_10_crop` is a copy of `IMG_10`, and
    not of `IMG_1`.

    Raises:
        DataError: two originals have the same name, or a copy has no original.
    """
    stems = {path: unicodedata.normalize("NFC", path.stem) for path in (*originals, *copies)}
    numbered = all(re.fullmatch("[0-9]{4}00", stems[path]) for path in originals)
    numbered = numbered and all(re.fullmatch("[0-9]{6}", stems[path]) for path in copies)
    known: dict[str, Path] = {}
    problems = []
    for path in originals:
        if (first := known.setdefault(stems[path][:BLOCK] if numbered else stems[path], path)) != path:
            rule = "the names of originals must differ before the suffix"
            problems.append(f"{rule}, but there are {first} and {path}; rename one, or name originals in {TABLE}")
    paired = {}
    for path in copies:
        stem = stems[path]
        starts = [stem[:BLOCK]] if numbered else [stem[:end] for end in range(len(stem), 0, -1) if _is_end(stem, end)]
        if original := next((known[start] for start in starts if start in known), None):
            paired[path] = original
        else:
            whole = "the name of a copy must begin with the whole name of its original"
            rule = f"the first {BLOCK} digits of a copy name its original" if numbered else whole
            problems.append(f"{rule}, but there is no such original for {path}; rename it, or name both in {TABLE}")
    if problems:
        raise DataError(problems)
    return paired


def _is_end(stem: str, end: int) -> bool:
    """Return whether neither a word nor a number goes on at a place in a name."""
    before, after = stem[end - 1], stem[end : end + 1]
    return not ((before.isdigit() and after.isdigit()) or (before.isalpha() and after.isalpha()))


def _by_table(root: Path, originals: Sequence[Path], copies: Sequence[Path]) -> dict[Path, Path]:
    """Map each copy to its original by the rows of the table. Raises DataError if it is not complete and right."""
    file = root / TABLE
    (line, header), *rows = read_rows(file, COLUMNS)
    if sorted(header) != sorted(COLUMNS):
        raise DataError([f"{file}, line {line}: the columns must be {' and '.join(COLUMNS)}, got {', '.join(header)}"])
    places = {path.relative_to(root).as_posix(): path for path in (*originals, *copies)}
    known, asked = {*originals}, {*copies}
    paired: dict[Path, Path] = {}
    problems = []
    for line, cells in rows:
        if len(cells) != len(header):
            problems.append(f"{file}, line {line}: a row must be a copy and its original, got {cells}")
            continue
        named = {column: places.get(os.path.normpath(cell)) for column, cell in zip(header, cells, strict=True)}
        copy, original = (named[column] for column in COLUMNS)
        if copy is None or original is None or copy not in asked or original not in known:
            where = f"{PARTS[1]}/ and its original in {PARTS[0]}/"
            problems.append(f"{file}, line {line}: a row must name an image in {where}, got {', '.join(cells)}")
        elif paired.setdefault(copy, original) != original:
            got = f"{copy} is a copy of {paired[copy]}, too"
            problems.append(f"{file}, line {line}: a copy has one original, but {got}")
    missing = [path for path in copies if path not in paired]
    problems += [f"{file} must name the original of each copy, but not that of {path}; add a row" for path in missing]
    if problems:
        raise DataError(problems)
    return paired

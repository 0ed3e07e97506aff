"""Helpers for reading benchmarks from disk: lists of files, and sentences on what is missing. No torch is imported."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from multigrain.data.listing import Listing, by_reason, list_images
from multigrain.data.picture import Picture
from multigrain.errors import DataError

SHOWN = 5
"""Names that one sentence shows; the others are counted."""


def indices(numbers: Iterable[int]) -> NDArray[np.int64]:
    """Return the numbers as an ascending array (N,), as `Truth` holds them."""
    return np.array(sorted(numbers), dtype=np.int64)


def images(folder: Path, problems: list[str], deep: bool = False) -> list[Path]:
    """List the images in a folder, none if it is missing.

    Args:
        folder: the folder.
        problems: gets a sentence for each reason why files are left out; files of other kinds need none.
        deep: include the images in subfolders.
    """
    found = list_images(folder, deep)
    problems += unread(folder, found)
    return [folder / name for name in found.names]


def unread(folder: Path, found: Listing) -> list[str]:
    """Return a sentence for each reason why files are left out, except that they are no images by their suffix."""
    return [
        problem
        for reason, names in by_reason(found.unread).items()
        for problem in noted(f"files or folders in {folder} are left out, because each {reason}", names)
    ]


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Map each file's name without suffix to the file.

    Raises:
        DataError: two files have the same name.
    """
    found: dict[str, Path] = {}
    problems = [
        f"an image's name without suffix must come once, but there are {first} and {path}; keep one"
        for path in paths
        if (first := found.setdefault(path.stem, path)) != path
    ]
    if problems:
        raise DataError(problems)
    return found


def pictures(paths: Iterable[Path]) -> tuple[Picture, ...]:
    """Return pictures that show whole files, not turned."""
    return tuple(Picture(path) for path in paths)


def demand(title: str, root: Path, wanted: Mapping[str, object]) -> None:
    """Raise an error that names everything a set needs and lacks.

    Args:
        wanted: description of what is needed below `root` -> what was found of it, empty or False if nothing.
    Raises:
        DataError: something is lacking.
    """
    lacking = [what for what, found in wanted.items() if not found]
    if not lacking:
        return
    there = some(sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())) or "nothing"
    raise DataError(
        [
            f"{title} needs {what}, found none in {root}, which holds {there}; name the folder that holds the set"
            for what in lacking
        ]
    )


def some(names: Iterable[object]) -> str:
    """Join the first `SHOWN` names, and count the others."""
    texts = [str(name) for name in names]
    more = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def noted(what: str, names: Iterable[object]) -> list[str]:
    """Return a list with a sentence on some names and their number; an empty list if there are no names."""
    listed = [*names]
    return [f"{len(listed):,} {what}: {some(listed)}"] if listed else []


def counted(what: str, expected: int, found: int) -> list[str]:
    """Return a list with a sentence on a number that differs from the expected one; an empty list if it does not."""
    return [] if found == expected else [f"the set holds {expected:,} {what}, found {found:,}"]

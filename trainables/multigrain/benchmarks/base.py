"""What a benchmark is: its pictures, what shows the same, what it lacks; and how its folders are listed.

No torch here, as in `data`.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from multigrain.data.folders import SUFFIXES
from multigrain.data.picture import Picture
from multigrain.errors import DataError

SHOWN = 5
"""Names that one sentence tells; of the others, the number is."""


def indices(numbers: Iterable[int]) -> NDArray[np.int64]:
    """(N,) ascending, as `Truth` holds them."""
    return np.array(sorted(numbers), dtype=np.int64)


def listing(folder: Path, deep: bool = False) -> list[Path]:
    """The files in a folder, with `deep` those below it, too; sorted; none if it is missing. Hidden ones do not count.

    Sorted here, since the order of names on disk is no order: UKBench's and Holidays' follow from the names alone.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def images(folder: Path, deep: bool = False) -> list[Path]:
    """Those of the `listing` that are images by their suffix."""
    return [path for path in listing(folder, deep) if path.suffix.lower() in SUFFIXES]


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """The files by their name without suffix.

    Raises:
        DataError: a name comes twice.
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
    """Whole and upright images."""
    return tuple(Picture(path) for path in paths)


def demand(title: str, root: Path, wanted: Mapping[str, object]) -> None:
    """Stop with all that a set cannot do without.

    Args:
        wanted: what is looked for below `root` -> what was found of it.
    Raises:
        DataError: something found is empty.
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
    """The first `SHOWN` names, and how many more there are."""
    told = [str(name) for name in names]
    more = len(told) - SHOWN
    return ", ".join(told[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def noted(what: str, names: Iterable[object]) -> list[str]:
    """The sentence on some names, with their number before it; none if there are no names."""
    told = [*names]
    return [f"{len(told):,} {what}: {some(told)}"] if told else []


def counted(what: str, expected: int, found: int) -> list[str]:
    """The sentence on a number that is not what it should be; none if it is."""
    return [] if found == expected else [f"the set holds {expected:,} {what}, found {found:,}"]

"""Evaluation of a trained network on benchmarks: what the user asks for.

No torch here, as in `data`.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from multigrain import benchmarks
from multigrain.data import DataError
from multigrain.pictures import Benchmark, images
from multigrain.spec import Settings

Size = Annotated[int, Field(ge=16)]
Exponent = Annotated[float, Field(ge=1, allow_inf_nan=True)]


def _known(on: dict[str, str]) -> dict[str, str]:
    if strangers := [name for name in on if name not in benchmarks.NAMES]:
        raise ValueError(f"benchmarks must be among {', '.join(benchmarks.NAMES)}, got {', '.join(strangers)}")
    return on


class Evaluation(Settings):
    """Benchmarks, and the grid of settings at which a network is evaluated on them."""

    on: Annotated[dict[str, str], Field(min_length=1), AfterValidator(_known)]
    """Benchmark -> its folder; `manifest` -> its file."""
    sizes: Annotated[tuple[Size, ...], Field(min_length=1, strict=False)] | None = None
    """s*, in pixels; the network's own by default [P Table 2: 224, 500, 800]."""
    exponents: Annotated[tuple[Exponent, ...], Field(min_length=1, strict=False)] | None = None
    """p*; the network's own by default [P section 3.5: 3 to 5]."""
    whiten: str | None = None
    """Folder of images on which a whitening is fitted for each size and exponent; none by default [R: 20,000]."""
    loaders: int = Field(0, ge=0)
    """Processes that read images."""


def sets(evaluation: Evaluation) -> list[Benchmark]:
    """The benchmarks as they lie on disk.

    Raises:
        DataError: with everything for which one of them cannot be evaluated.
    """
    found, problems = [], []
    for name, root in evaluation.on.items():
        try:
            found.append(benchmarks.read(name, Path(root)))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def whitening_images(folder: Path) -> list[Path]:
    """The images below a folder, sorted.

    Raises:
        DataError: there are none.
    """
    found = images(folder, deep=True)
    if not found:
        raise DataError([f"whitening needs images, but there are none below {folder.absolute()}; name another folder"])
    return found

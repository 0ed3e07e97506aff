"""Evaluation of a trained network on benchmarks: what the user asks for, and what it is made of on disk.

No torch here, as in `data`.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from multigrain.benchmarks import readers
from multigrain.benchmarks.base import Benchmark, images, noted, some
from multigrain.config.training import Positive, Settings
from multigrain.data import remote
from multigrain.data.cache import Cache
from multigrain.data.folders import DataError, Dataset, read_dataset

Found = TypeVar("Found")
Size = Annotated[int, Field(ge=16)]
Exponent = Annotated[float, Field(ge=1, allow_inf_nan=True)]
PROXY = "proxy"
"""Stands for the exponent that the proxy task chose."""


def _known(on: dict[str, str]) -> dict[str, str]:
    if strangers := [name for name in on if name not in readers.NAMES]:
        raise ValueError(f"benchmarks must be among {', '.join(readers.NAMES)}, got {', '.join(strangers)}")
    return on


def _served(p: float | str) -> float | str:
    if p == PROXY or (isinstance(p, float) and p >= 1):
        return p
    raise ValueError(f"must be a number from 1 on, or the word {PROXY}, got {p!r}; the paper has 3 to 5")


class Serve(Settings):
    """The setting at which a copy of the model is kept for its users."""

    size: Size
    """s*, in pixels; it joins the grid."""
    p: Annotated[Annotated[float, Field(allow_inf_nan=True)] | str, AfterValidator(_served)]
    """p*, which joins the grid, or `proxy`: the one that the proxy task chose for this size."""
    whitened: bool = False
    """Whether descriptors are whitened, by the whitening of this size and exponent."""


class Evaluation(Settings):
    """Benchmarks, and the grid of settings at which a network is evaluated on them."""

    on: Annotated[dict[str, str], Field(min_length=1), AfterValidator(_known)]
    """Benchmark -> its folder; `manifest` -> its file. These and all folders below can be s3://bucket/prefix."""
    sizes: Annotated[tuple[Size, ...], Field(min_length=1, strict=False)] | None = None
    """s*, in pixels; the network's own by default [P Table 2: 224, 500, 800]."""
    exponents: Annotated[tuple[Exponent, ...], Field(min_length=1, strict=False)] | None = None
    """p*; the network's own by default [P section 3.5: 3 to 5]."""
    whiten: str | None = None
    """Folder of images, or text file with the path of one in each line, on which a whitening is fitted for each size
    and exponent; none by default [R: 20,000]."""
    dimension: int | None = Field(None, ge=1)
    """Directions that a whitening keeps, those of the largest variance; all by default [R]."""
    proxy: str | None = None
    """Folder of training images by class, `train/<class>/` or `<class>/`, on copies of which p* is chosen among the
    exponents for each size; none by default [P section 3.5]."""
    serve: Serve | None = None
    """The setting at which a copy of the model is kept for its users, such as `{size: 500, p: 4, whitened: true}`, with
    `proxy` for p* as the proxy task chose it; none by default."""
    cache: str = "~/.cache/grainmill"
    """Folder for what is read from s3://, shared by all processes of a machine."""
    cache_limit: Positive | None = None
    """GB that it may hold, half of the disk by default; what no running process reads makes room, the latest last."""
    loaders: int = Field(0, ge=0)
    """Processes that read images."""

    @model_validator(mode="after")
    def _needs(self) -> Self:
        problems = []
        if self.dimension is not None and self.whiten is None:
            problems.append(f"dimension must come with whiten, got {self.dimension} alone; name a folder in whiten")
        if self.serve and self.serve.whitened and self.whiten is None:
            problems.append("serve.whitened must come with whiten, got it alone; name a folder in whiten")
        if self.serve and self.serve.p == PROXY and self.proxy is None:
            problems.append(f"serve.p = {PROXY} must come with proxy, got it alone; name a folder in proxy")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def local(self, source: str) -> Path:
        """The local path of a folder or file; what lies in s3:// is read into `cache`.

        Raises:
            DataError: it cannot be read.
        """
        return remote.local(source, Cache(Path(self.cache).expanduser().absolute(), self.cache_limit))


class Inputs(NamedTuple):
    """What an evaluation reads, as it lies on disk."""

    benchmarks: list[Benchmark]
    whitening: list[Path]
    """Images, sorted; none if there is no whitening."""
    proxy: Dataset | None


def inputs(evaluation: Evaluation, classes: Sequence[str], channels: int) -> Inputs:
    """All that an evaluation reads; no image is opened.

    Args:
        classes: of the network.
        channels: C, of its embeddings.
    Raises:
        DataError: with everything for which the evaluation cannot be.
    """
    problems: list[str] = []

    def kept(read: Callable[[], Found]) -> list[Found]:
        try:
            return [read()]
        except DataError as error:
            problems.extend(error.problems)
            return []

    on = kept(lambda: _sets(evaluation, classes))
    whitening = kept(lambda: _whitening_images(evaluation, channels))
    proxy = kept(lambda: _proxy_images(evaluation, classes))
    if problems:
        raise DataError(problems)
    return Inputs(on[0], whitening[0], proxy[0])


def _sets(evaluation: Evaluation, classes: Sequence[str]) -> list[Benchmark]:
    found, problems = [], []
    for name, source in evaluation.on.items():
        try:
            found.append(readers.read(name, evaluation.local(source)))
        except DataError as error:
            problems += error.problems
    problems += [
        f"{one.name} needs a network of its classes, but this one knows {len(classes)} others; leave it out"
        for one in found
        if one.labels is not None and list(one.classes) != list(classes)
    ]
    if problems:
        raise DataError(problems)
    return found


def _whitening_images(evaluation: Evaluation, channels: int) -> list[Path]:
    if evaluation.whiten is None:
        return []
    most = channels + 1  # a constant channel is appended
    if evaluation.dimension is not None and evaluation.dimension > most:
        got = f"dimension must be at most {most}, the network's channels and one more, got {evaluation.dimension}"
        raise DataError([f"{got}; lower it or leave it out"])
    source = evaluation.local(evaluation.whiten)
    found = _listed(source) if source.is_file() else images(source, deep=True)
    if not found:
        raise DataError([f"whitening needs images, but there are none in {source.absolute()}; name another folder"])
    dimension = evaluation.dimension or most
    if len(found) <= dimension:
        got = f"whitening needs more images than dimensions, got {len(found)} for {dimension} in {source.absolute()}"
        raise DataError([f"{got}; add images or set a smaller dimension"])
    return found


def _listed(file: Path) -> list[Path]:
    """Images that the lines of a file name, from its folder on."""
    paths = [file.parent / line for line in os.fsdecode(file.read_bytes()).splitlines() if line.strip()]
    if missing := noted(f"images of {file.absolute()} are missing", [path for path in paths if not path.is_file()]):
        raise DataError(missing)
    return sorted({*paths})


def _proxy_images(evaluation: Evaluation, classes: Sequence[str]) -> Dataset | None:
    if evaluation.proxy is None:
        return None
    folder = evaluation.local(evaluation.proxy)
    found = read_dataset(folder)
    if list(found.classes) != list(classes):
        got = f"proxy needs images of the network's {len(classes)} classes ({some(classes)})"
        here = f"got {len(found.classes)} ({some(found.classes)}) in {folder.absolute()}"
        raise DataError([f"{got}, {here}; name the folder that it was trained on"])
    return found

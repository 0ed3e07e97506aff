"""Reading of everything that an evaluation needs from disk. No torch is imported here."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from multigrain.benchmarks import readers
from multigrain.benchmarks.base import images, noted, some
from multigrain.config.evaluation import Evaluation
from multigrain.data.dataset import Dataset
from multigrain.data.folders import read_dataset
from multigrain.data.listing import identity
from multigrain.data.tables import SEPARATORS, decoded
from multigrain.errors import DataError
from multigrain.evaluation.benchmark import Benchmark
from multigrain.hooks import Files, LocalFiles, Mirror, data_errors, no_progress


class Inputs(NamedTuple):
    """Files that an evaluation reads."""

    benchmarks: list[Benchmark]
    whitening: list[Path]
    """Sorted images to fit a whitening on; empty if none is asked for."""
    proxy: Dataset | None
    """Training images of the proxy task."""
    problems: list[str]
    """Sentences on files that the folder of images for the whitening holds besides."""


def inputs(evaluation: Evaluation, classes: Sequence[str], channels: int, files: Files | None = None) -> Inputs:
    """List everything that an evaluation reads; no image is opened.

    Args:
        classes: names of the network's classes.
        channels: C, the number of channels of its embeddings.
        files: access to sources in S3.
    Raises:
        DataError: the evaluation is impossible; all reasons are given.
    """
    problems: list[str] = []
    benchmarks, whitening, proxy = [], [], None
    unread: list[str] = []
    mirror = (files or LocalFiles()).mirror(evaluation.cache, evaluation.cache_limit)
    for name, source in evaluation.on.items():
        with _gather(problems):
            benchmarks.append(_benchmark(name, _local(mirror, source), classes))
    with _gather(problems):
        whitening = _whitening_images(evaluation, channels, mirror, unread)
    with _gather(problems):
        proxy = _proxy_images(evaluation, classes, mirror)
    if problems:
        raise DataError(problems)
    return Inputs(benchmarks, whitening, proxy, unread)


@contextmanager
def _gather(problems: list[str]) -> Iterator[None]:
    """Add the problems of a DataError to a list instead of raising it."""
    try:
        yield
    except DataError as error:
        problems.extend(error.problems)


def _benchmark(name: str, root: Path, classes: Sequence[str]) -> Benchmark:
    found = readers.read(name, root)
    if found.labels is not None and list(found.classes) != list(classes):
        got = f"{name} needs a network of its classes, but this one knows {len(classes)} others; leave it out"
        raise DataError([got])
    return found


def _whitening_images(evaluation: Evaluation, channels: int, mirror: Mirror, unread: list[str]) -> list[Path]:
    if evaluation.whiten is None:
        return []
    most = channels + 1  # a constant channel is appended
    if evaluation.dimension is not None and evaluation.dimension > most:
        got = f"dimension must be at most {most}, the network's channels and one more, got {evaluation.dimension}"
        raise DataError([f"{got}; lower it or leave it out"])
    source = _local(mirror, evaluation.whiten)
    found = _listed(source) if source.is_file() else images(source, unread, deep=True)
    if not found:
        raise DataError([f"whitening needs images, but there are none in {source.absolute()}; name another folder"])
    dimension = evaluation.dimension or most
    if len(found) <= dimension:
        got = f"whitening needs more images than dimensions, got {len(found)} for {dimension} in {source.absolute()}"
        raise DataError([f"{got}; add images or set a smaller dimension"])
    return found


def _listed(file: Path) -> list[Path]:
    """Read the images that the lines of a file name, relative to its folder."""
    lines = [line for line in decoded(file, "list of images", "surrogateescape").splitlines() if line.strip()]
    files = {line: identity(file.parent / line) for line in lines}
    if missing := [line for line in files if files[line] is None]:
        for separator, word in {",": "commas", **SEPARATORS}.items():
            cells = [cell.strip(' "') for cell in missing[0].split(separator)]
            if len(cells) > 1 and ("image" in cells or any(identity(file.parent / cell) for cell in cells)):
                got = f"{missing[0]!r} has several cells, separated by {word}"
                raise DataError(
                    [f"a list of images has one path a line, but in {file.absolute()} {got}; keep the paths only"]
                )
        names = [file.parent / line for line in missing]
        raise DataError(noted(f"images of {file.absolute()} are missing", names))
    once: dict[Hashable, Path] = {}
    for line in lines:
        once.setdefault(files[line], file.parent / line)
    return sorted(once.values())


def _proxy_images(evaluation: Evaluation, classes: Sequence[str], mirror: Mirror) -> Dataset | None:
    if evaluation.proxy is None:
        return None
    folder = _local(mirror, evaluation.proxy)
    found = read_dataset(folder)
    if list(found.classes) != list(classes):
        got = f"proxy needs images of the network's {len(classes)} classes ({some(classes)})"
        here = f"got {len(found.classes)} ({some(found.classes)}) in {folder.absolute()}"
        raise DataError([f"{got}, {here}; name the folder that it was trained on"])
    return found


def _local(mirror: Mirror, source: str) -> Path:
    """Return the local path of a folder or file; what is in S3 is read first."""
    with data_errors():
        return mirror.fetch(source, no_progress)

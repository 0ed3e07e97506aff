"""Reading of any benchmark by its name. No torch is imported here."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from multigrain.benchmarks.imagenet import imagenet
from multigrain.benchmarks.instances import copydays, holidays, ukbench
from multigrain.benchmarks.landmarks import classic, revisited
from multigrain.benchmarks.lists import disc21, manifest
from multigrain.config.evaluation import BENCHMARKS
from multigrain.data.picture import Picture
from multigrain.errors import DataError
from multigrain.evaluation.benchmark import Benchmark

_READERS: Mapping[str, Callable[[Path], Benchmark]] = {
    "imagenet": imagenet,
    "holidays": holidays,
    "holidays-upright": partial(holidays, upright=True),
    "ukbench": ukbench,
    "copydays": copydays,
    "oxford5k": partial(classic, "oxford5k"),
    "paris6k": partial(classic, "paris6k"),
    "roxford5k": partial(revisited, "roxford5k"),
    "rparis6k": partial(revisited, "rparis6k"),
    "disc21": disc21,
    "manifest": manifest,
}


def read(name: str, root: Path) -> Benchmark:
    """List the images of a benchmark, with its truth; no image is opened.

    If files are missing but the rest can be evaluated, the benchmark's `problems` say so.

    Args:
        name: one of `BENCHMARKS`.
        root: the folder of the set, or the file of a `manifest`; see the set's reader for its files.
    Raises:
        DataError: the set cannot be evaluated; all reasons are given.
        ValueError: there is no benchmark of this name.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"a benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}")
    root = root.absolute()
    if name != "manifest" and not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError([f"the root of {name} must be a folder, but there is {found} at {root}; name the set's folder"])
    benchmark = _READERS[name](root)
    if name == "manifest" or (name == "copydays" and not benchmark.as_published):  # a user's own images
        return benchmark
    return replace(benchmark, database=_stored(benchmark.database), queries=_stored(benchmark.queries))


def _stored(pictures: tuple[Picture, ...]) -> tuple[Picture, ...]:
    """Return pictures as stored: the published protocols do not follow the EXIF orientation."""
    return tuple(picture._replace(upright=False) for picture in pictures)

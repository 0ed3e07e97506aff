"""What a measure is the mean of, and of which data: so that two networks can be compared query by query.

No torch here, as in `data`.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from multigrain.benchmarks.base import Benchmark


@dataclass(frozen=True)
class QueryScores:
    """The values of one measure on one benchmark at the setting at which a network answers."""

    name: str
    """Such as `roxford5k/hard/map`: that of a figure without its setting."""
    data: str
    """SHA-256 of all that the values depend on but the network: where equal, they are of the same queries, in order."""
    values: tuple[float, ...]
    """One for each query or image that counts; larger is better."""
    served: bool
    """Whether they are of the model that the evaluation makes, and not of the one that is evaluated."""


def digests(benchmark: Benchmark) -> dict[str, str]:
    """SHA-256 of each part of a benchmark: of its images as they are shown, by content, and of its truth or labels."""
    shown = [*benchmark.database, *benchmark.queries]
    contents = {path: _of_file(path) for path in dict.fromkeys(picture.path for picture in shown)}
    images = [f"{contents[picture.path]} {picture.box} {picture.turn}" for picture in shown]
    same = [benchmark.name, len(benchmark.database), *images, benchmark.classes, benchmark.labels]
    parts = benchmark.truth or {"": ()}
    return {
        part: _of_lines([*same, part, *((one.positives.tolist(), one.junk.tolist()) for one in truths)])
        for part, truths in parts.items()
    }


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_lines(lines: Iterable[object]) -> str:
    return hashlib.sha256("\n".join(map(repr, lines)).encode()).hexdigest()

"""The files of an evaluation: written to a draft, and put in place together."""

import csv
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from multigrain.benchmarks.base import Benchmark
from multigrain.benchmarks.figures import Measurement
from multigrain.benchmarks.proxy import Score
from multigrain.config.evaluation import BENCHMARKS

_RESULTS = (
    *("figures.csv", "grid.png", "proxy.csv", "whitening-*.safetensors"),
    *(f"{name}{rest}.html" for name in BENCHMARKS for rest in ("", "-*")),
)


def write_figures(path: Path, figures: Sequence[Measurement]) -> None:
    """Write a row for each figure."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["benchmark", "setting", "measure", "size", "p", "whitened", "value", "low", "high", "paper"])
        for one in figures:
            at = (one.at.size, one.at.p, one.at.whitened)
            writer.writerow([one.benchmark, one.part, one.measure, *at, one.value, one.low, one.high, one.paper])


def write_proxy(path: Path, scores: Mapping[int, Mapping[float, Score]], chosen: Mapping[int, float]) -> None:
    """Write a row for each size and exponent that the proxy task scored.

    Args:
        scores: by size, then by exponent.
        chosen: p* of each size.
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["size", "p", "copy_map", "top1", "mean", "chosen"])
        for size, found in scores.items():
            for p, one in found.items():
                writer.writerow([size, p, one.copy_map, one.top1, one.mean, p == chosen[size]])


def page_name(benchmark: Benchmark, part: str) -> str:
    """File name of a benchmark's gallery."""
    return f"{benchmark.name} {part}.html".replace(" .", ".").replace(" ", "-").replace("/", "-")


def put_in_place(draft: Path, out: Path) -> None:
    """Results take the place of all those of an evaluation before; a model stays, unless there is a new one.

    Where there is a `figures.csv`, all is of one evaluation: it goes first and comes last.
    """
    for pattern in _RESULTS:
        for old in out.glob(pattern):
            old.unlink()
    for new in sorted(draft.iterdir(), key=lambda path: path.name == "figures.csv"):
        if new.is_dir():
            shutil.rmtree(out / new.name, ignore_errors=True)
        new.rename(out / new.name)

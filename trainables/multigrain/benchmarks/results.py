"""The result of an evaluation on benchmarks: its measurements, the tables that show them, and its files."""

import csv
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from multigrain.benchmarks.proxy import Score
from multigrain.config.evaluation import BENCHMARKS
from multigrain.digests import digest, file_digest
from multigrain.evaluation.benchmark import Benchmark
from multigrain.evaluation.embed import Setting

_RESULTS = (
    *("figures.csv", "grid.png", "proxy.csv", "whitening-*.safetensors"),
    *(f"{name}{rest}.html" for name in BENCHMARKS for rest in ("", "-*")),
)
"""Names of the files that an evaluation writes and replaces."""


def measure_name(*parts: str) -> str:
    """Join benchmark, part, measure and setting, such as `roxford5k/hard/map/500/p4-whitened`, as MLflow allows.

    No name is the beginning of another followed by a slash, since MLflow stores some names as paths.
    """
    return "/".join(part for part in parts if part).replace("@", "-at-").replace("+", "")


@dataclass(frozen=True)
class Measurement:
    """A measure of a benchmark at a setting."""

    benchmark: str
    part: str
    """Part of the benchmark's protocol, such as `hard`; empty where the protocol has but one."""
    measure: str
    at: Setting
    value: float
    low: float
    """Lower end of the 95 % bootstrap interval over queries."""
    high: float
    paper: float | None = None
    """The paper's value for its network of the same trunk, lambda and p, at this size."""

    @property
    def name(self) -> str:
        """Name in MLflow, see `measure_name`."""
        return measure_name(self.benchmark, self.part, self.measure, self.at.name)


@dataclass(frozen=True)
class QueryScores:
    """The score of each query, whose mean is a measure, to compare two networks query by query."""

    name: str
    """Name of the measure without a setting, such as `roxford5k/hard/map`."""
    data: str
    """SHA-256 of the benchmark's images and truth, see `digests`. Scores with equal digests are of the same queries."""
    values: tuple[float, ...]
    """Scores of the queries or images that count, in order; larger is better."""
    served: bool
    """True for scores of the model that the evaluation makes, False for scores of the model that it evaluates."""


class ResultGrid(NamedTuple):
    """A measure at every size and exponent."""

    title: str
    sizes: Sequence[int]
    exponents: Sequence[float]
    values: Sequence[Sequence[float]]
    """A row for each size, a column for each exponent."""


class ResultTable(NamedTuple):
    """A table to show to users; all cells are text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation on benchmarks; it can be pickled."""

    measurements: Sequence[Measurement]
    """All measures at all settings."""
    headlines: Sequence[Measurement]
    """The most important measurements, see `headlines`."""
    tables: Sequence[ResultTable]
    """The headlines, the grids, and the paper's results."""
    notes: Sequence[str]
    """Sentences on the conditions of the measurements, such as missing images."""
    files: Sequence[Path]
    model: Path | None
    """Folder of the model that serves the setting `Evaluation.serve`; `export.inference.load` reads it."""
    served: str | None
    """Name of the setting that `model` serves, such as `500/p4-whitened`."""
    query_scores: Sequence[QueryScores]
    """Scores of the evaluated model at its own setting, unless it serves another one, and scores of `model`."""


def grids(measurements: Sequence[Measurement]) -> list[ResultGrid]:
    """Arrange the first measure of each part of each benchmark by size and exponent, whitened or not."""
    first = {one.benchmark: one.measure for one in reversed(measurements)}
    panels: dict[tuple[str, str, bool], dict[tuple[int, float], float]] = {}
    for one in measurements:
        if one.measure == first[one.benchmark]:
            panels.setdefault((one.benchmark, one.part, one.at.whitened), {})[one.at.size, one.at.p] = one.value
    found = []
    for (name, part, whitened), value in panels.items():
        sizes, exponents = sorted({size for size, _ in value}), sorted({p for _, p in value})
        title = " ".join(filter(None, (name, part, first[name]))) + (", whitened" if whitened else "")
        found.append(ResultGrid(title, sizes, exponents, [[value[size, p] for p in exponents] for size in sizes]))
    return found


def headlines(measurements: Sequence[Measurement], settings: Sequence[Setting]) -> list[Measurement]:
    """Choose, for each measure, the measurements at some settings, in their order, and the best one; each once.

    The settings after the first count for the first measure of each benchmark only.
    """
    first = {one.benchmark: one.measure for one in reversed(measurements)}
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((one.benchmark, one.part, one.measure), []).append(one)
    chosen: list[Measurement] = []
    for (benchmark, _, measure), group in groups.items():
        wanted = settings if measure == first[benchmark] else settings[:1]
        at_settings = [one for at in wanted for one in group if one.at == at]
        chosen += dict.fromkeys([*at_settings, max(group, key=lambda one: one.value)])
    return chosen


def headline_table(chosen: Sequence[Measurement]) -> ResultTable:
    """Arrange measurements as a table, one in each row."""
    rows = []
    for one in chosen:
        paper = "" if one.paper is None else f"{one.paper:.4f}"
        rows.append((one.name, f"{one.value:.4f}", f"{one.low:.4f} to {one.high:.4f}", paper))
    return ResultTable("", ("", "value", "95 % interval", "paper"), rows)


def grid_table(grid: ResultGrid) -> ResultTable:
    """Arrange a grid as a table, one size in each row."""
    rows = [(str(size), *map("{:.4f}".format, row)) for size, row in zip(grid.sizes, grid.values, strict=True)]
    return ResultTable(grid.title, ("s*, pixels \\ p*", *map("{:.3g}".format, grid.exponents)), rows)


def digests(benchmark: Benchmark) -> dict[str, str]:
    """Return the SHA-256 of each part of a benchmark: of its images' content as shown, and of its truth or labels."""
    shown = [*benchmark.database, *benchmark.queries]
    contents = {path: file_digest(path) for path in dict.fromkeys(picture.path for picture in shown)}
    images = [f"{contents[picture.path]} {picture.box} {picture.turn}" for picture in shown]
    same = [benchmark.name, len(benchmark.database), *images, benchmark.classes, benchmark.labels]
    parts = benchmark.truth or {"": ()}
    return {
        part: _digest_of_lines([*same, part, *((one.positives.tolist(), one.junk.tolist()) for one in truths)])
        for part, truths in parts.items()
    }


def _digest_of_lines(lines: Iterable[object]) -> str:
    return digest("\n".join(map(repr, lines)).encode())


def write_measurements(path: Path, measurements: Sequence[Measurement]) -> None:
    """Write a CSV file with a row for each measurement."""
    header = ("benchmark", "setting", "measure", "size", "p", "whitened", "value", "low", "high", "paper")
    rows = [
        (one.benchmark, one.part, one.measure, *one.at, one.value, one.low, one.high, one.paper) for one in measurements
    ]
    _write_csv(path, header, rows)


def write_proxy(path: Path, scores: Mapping[int, Mapping[float, Score]], chosen: Mapping[int, float]) -> None:
    """Write a CSV file with a row for each size and exponent that the proxy task scored.

    Args:
        scores: by size, then by exponent.
        chosen: p* of each size.
    """
    rows = (
        (size, p, one.copy_map, one.top1, one.mean, p == chosen[size])
        for size, by_exponent in scores.items()
        for p, one in by_exponent.items()
    )
    _write_csv(path, ("size", "p", "copy_map", "top1", "mean", "chosen"), rows)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def page_name(benchmark: Benchmark, part: str) -> str:
    """Return the file name of the gallery of a benchmark's part."""
    return f"{benchmark.name} {part}.html".replace(" .", ".").replace(" ", "-").replace("/", "-")


def put_in_place(draft: Path, out: Path) -> None:
    """Replace the results of an earlier evaluation in `out` by those in `draft`; keep a model if there is no new one.

    `figures.csv` is removed first and written last: a folder that holds it holds all results of one evaluation.
    """
    for pattern in _RESULTS:
        for old in out.glob(pattern):
            old.unlink()
    for new in sorted(draft.iterdir(), key=lambda path: path.name == "figures.csv"):
        if new.is_dir():
            shutil.rmtree(out / new.name, ignore_errors=True)
        new.rename(out / new.name)

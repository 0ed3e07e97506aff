"""A trained network on benchmarks: one figure for each measure, size, exponent, whitened or not."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from multigrain import checkpoint, gallery, grid, search
from multigrain.augment import EvaluationTransform
from multigrain.data import DataError
from multigrain.evaluation import Evaluation, sets, whitening_images
from multigrain.grid import Setting
from multigrain.model import MultiGrain
from multigrain.pictures import Benchmark
from multigrain.predict import network_of
from multigrain.published import PUBLISHED
from multigrain.retrieval import MEASURES, interval
from multigrain.spec import MultiGrainSpec
from multigrain.views import Source
from multigrain.whitening import Whitening

Embeddings = NDArray[np.float32]
COPYDAYS_ORIGINALS = 157


@dataclass(frozen=True)
class Figure:
    """One measure of one benchmark at one setting."""

    benchmark: str
    part: str
    """A setting of the benchmark's protocol, such as `hard`; empty where there is one."""
    measure: str
    at: Setting
    value: float
    low: float
    high: float
    """Ends of the 95 % bootstrap interval over queries."""
    paper: float | None = None
    """What the paper has for its network of the same lambda and p, at this size."""

    @property
    def name(self) -> str:
        """Such as `roxford5k/hard/map/500/p4/whitened`."""
        size, p, whitened = self.at
        parts = (self.benchmark, self.part, self.measure, str(size), f"p{p:g}", "whitened" if whitened else "")
        return "/".join(part for part in parts if part).replace("@", "-at-").replace("+", "")  # MLflow's rules


@dataclass(frozen=True)
class Assessment:
    """What came of an evaluation."""

    figures: Sequence[Figure]
    """All of the grid."""
    headlines: Sequence[Figure]
    """For each measure the figure at the network's own setting and, where it is another, at the best one."""
    notes: Sequence[str]
    """What a reader must know to believe the figures."""
    files: Sequence[Path]


def evaluate(folder: Path, settings: Evaluation, out: Path) -> Assessment:
    """Evaluate the newest intact checkpoint below a training folder.

    Images pass through the trunk once for each size; retrieval sees them whole (`rect`), classification as the
    network's settings say at its own size, whole at others. What was embedded is kept below `out`: an evaluation
    that was cut short goes on there.

    Args:
        folder: where `fit` left its checkpoints.
        settings: benchmarks and grid.
        out: folder for `figures.csv`, `grid.png`, galleries and whitenings.
    Raises:
        FileNotFoundError: there is no intact checkpoint.
        DataError: a benchmark cannot be evaluated, or the network knows other classes than it.
    """
    benchmarks = sets(settings)
    saved = checkpoint.latest(folder)
    if saved is None:
        raise FileNotFoundError(f"an evaluation needs a trained network, but {folder} holds no intact checkpoint")
    network, spec = network_of(saved)
    _check_classes(benchmarks, saved.state["classes"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = _Run(network.to(device).requires_grad_(False), spec, settings, out, device)
    out.mkdir(parents=True, exist_ok=True)
    figures = [figure for size in run.sizes for figure in run.at_size(size, benchmarks)]
    files = [_write_csv(out / "figures.csv", figures)]
    if len(run.sizes) * len(run.exponents) > 1:
        files.append(gallery.heat_map(out / "grid.png", figures))
    files += [run.page(benchmark, part) for benchmark in benchmarks for part in benchmark.truth]
    notes = [f"{benchmark.name} is not whole: {problem}" for benchmark in benchmarks for problem in benchmark.problems]
    if spec.model.trunk != "resnet50" and any(figure.paper is not None for figure in figures):
        notes.append(f"the paper's figures are those of a ResNet-50, and this network is {spec.model.trunk}")
    return Assessment(figures, _headlines(figures, run.own), notes, files)


def _check_classes(benchmarks: Sequence[Benchmark], classes: Sequence[str]) -> None:
    others = [one.name for one in benchmarks if one.labels is not None and list(one.classes) != list(classes)]
    if others:
        raise DataError(
            [
                f"{name} needs a network of its classes, but this one knows {len(classes)} others; leave it out"
                for name in others
            ]
        )


class _Run:
    """One evaluation: what its steps share."""

    def __init__(
        self, network: MultiGrain, spec: MultiGrainSpec, settings: Evaluation, out: Path, device: torch.device
    ) -> None:
        self.network, self.spec, self.settings, self.out, self.device = network, spec, settings, out, device
        own = max(1.0, float(network.pool.p))  # one that learns counts as 1 below 1
        self.own = Setting(spec.evaluation_size, own, False)
        self.sizes = tuple(dict.fromkeys((spec.evaluation_size, *(settings.sizes or ()))))
        named: dict[str, float] = {}
        for p in (own, *(settings.exponents or ())):
            named.setdefault(f"{p:g}", p)  # figures could not be told apart where 2.2 was learnt as fp32 has it
        self.exponents = tuple(named.values())

    def page(self, benchmark: Benchmark, part: str) -> Path:
        """Of a benchmark's gallery."""
        return self.out / f"{benchmark.name} {part}.html".replace(" .", ".").replace(" ", "-").replace("/", "-")

    def at_size(self, size: int, benchmarks: Sequence[Benchmark]) -> Iterator[Figure]:
        """The figures of one size: every image passes through the trunk once."""
        whitenings = self._whitenings(size)
        for benchmark in benchmarks:
            pictures = (*benchmark.database, *benchmark.queries)
            own = benchmark.labels is not None and size == self.own.size
            transform = self.spec.evaluation.transform if own else "rect"
            for p, embeddings in self._embed(pictures, size, transform).items():
                for whitening in (None, whitenings[p]) if whitenings and benchmark.truth else (None,):
                    at = Setting(size, p, whitening is not None)
                    yield from self._figures(benchmark, embeddings, whitening, at)

    def _embed(self, pictures: Sequence[Source], size: int, transform: EvaluationTransform) -> dict[float, Embeddings]:
        folder, loaders = self.out / "embeddings", self.settings.loaders
        return grid.embed(self.network, pictures, size, transform, self.exponents, self.device, loaders, folder)

    def _whitenings(self, size: int) -> dict[float, Whitening]:
        if self.settings.whiten is None:
            return {}
        images = whitening_images(Path(self.settings.whiten))
        found = {}
        for p, embeddings in self._embed(images, size, "rect").items():
            found[p] = Whitening.fit(torch.from_numpy(embeddings))
            save_file(found[p].state_dict(), self.out / f"whitening-{size}-p{p:g}.safetensors")
        return found

    def _figures(
        self, benchmark: Benchmark, embeddings: Embeddings, whitening: Whitening | None, at: Setting
    ) -> Iterator[Figure]:
        if benchmark.labels is not None:
            yield from self._of_classes(benchmark, embeddings, at)
            return
        descriptors = grid.descriptors(embeddings, whitening)
        count = len(benchmark.database)
        database, queries = descriptors[:count], descriptors[count:]
        for part, truths in benchmark.truth.items():
            # A query from whose list everything is taken out belongs to other parts of the protocol.
            asked = [query for query, one in enumerate(truths) if len(one.junk) < count]
            truth, rows = [truths[query] for query in asked], queries[asked]
            ranks = search.ranks(rows, database, truth, self.device)
            pairs = None
            for name in benchmark.measures:
                measure = MEASURES[name]
                if measure.source == "ranks":
                    values = measure.values(ranks)
                    ends = interval(values)
                else:
                    pairs = pairs or search.pairs(rows, database, truth, self.device)
                    values = measure.values(pairs)
                    ends = interval(pairs, measure=measure.values)
                yield self._figure(benchmark, part, name, at, float(values.mean()), ends)
            if at == self.own:
                shown = replace(
                    benchmark, queries=tuple(benchmark.queries[query] for query in asked), truth={part: tuple(truth)}
                )
                gallery.page(self.page(benchmark, part), shown, part, rows, database, ranks)

    def _of_classes(self, benchmark: Benchmark, embeddings: Embeddings, at: Setting) -> Iterator[Figure]:
        logits = self.network.head(torch.from_numpy(embeddings).to(self.device)).logits.cpu().numpy()
        for name in benchmark.measures:
            values = MEASURES[name].values(logits, np.array(benchmark.labels))
            yield self._figure(benchmark, "", name, at, float(values.mean()), interval(values))

    def _figure(
        self, benchmark: Benchmark, part: str, measure: str, at: Setting, value: float, ends: tuple[float, float]
    ) -> Figure:
        return Figure(benchmark.name, part, measure, at, value, *ends, self._paper(benchmark, part, measure, at))

    def _paper(self, benchmark: Benchmark, part: str, measure: str, at: Setting) -> float | None:
        """The paper's figure for its network of this lambda and p; none where images or database are others."""
        wanted = (benchmark.name, part, measure, at.size, self.spec.loss.weight, self.spec.model.p)
        for row in PUBLISHED:
            here = (row.benchmark, row.setting, row.measure, row.size, row.weight, row.p)
            distractors = len(benchmark.database) - COPYDAYS_ORIGINALS if row.distractors else 0
            if here == wanted and row.method == "MultiGrain" and row.distractors == distractors and benchmark.whole:
                return row.value
        return None


def _headlines(figures: Sequence[Figure], own: Setting) -> list[Figure]:
    chosen: list[Figure] = []
    for key in dict.fromkeys((figure.benchmark, figure.part, figure.measure) for figure in figures):
        group = [figure for figure in figures if (figure.benchmark, figure.part, figure.measure) == key]
        best = max(group, key=lambda figure: figure.value)
        chosen += dict.fromkeys([*(figure for figure in group if figure.at == own), best])
    return chosen


def _write_csv(path: Path, figures: Sequence[Figure]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["benchmark", "setting", "measure", "size", "p", "whitened", "value", "low", "high", "paper"])
        for one in figures:
            at = (one.at.size, one.at.p, one.at.whitened)
            writer.writerow([one.benchmark, one.part, one.measure, *at, one.value, one.low, one.high, one.paper])
    return path

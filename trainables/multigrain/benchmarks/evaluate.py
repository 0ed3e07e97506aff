"""A trained network on benchmarks: one figure for each measure, size, exponent, whitened or not."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from multigrain import distributed
from multigrain.benchmarks import gallery, proxy, published, results
from multigrain.benchmarks.base import Benchmark
from multigrain.benchmarks.figures import Measurement, ResultGrid, grids, headlines
from multigrain.benchmarks.inputs import Inputs, inputs
from multigrain.benchmarks.published import PublishedResult
from multigrain.benchmarks.samples import QueryScores, digests
from multigrain.config.evaluation import PROXY, Evaluation
from multigrain.config.training import MultiGrainSpec
from multigrain.data.loading import Source
from multigrain.data.transforms import EvaluationTransform
from multigrain.errors import DataError
from multigrain.evaluation import embed
from multigrain.evaluation.embed import Setting
from multigrain.hooks import Files
from multigrain.models import checkpoint, served_setting
from multigrain.models.multigrain import MultiGrain, network_of
from multigrain.models.whitening import Whitening
from multigrain.retrieval import ranking
from multigrain.retrieval.metrics import MEASURES, Floats, Truth, interval

Embeddings = NDArray[np.float32]
Result = tuple[float, tuple[float, float]]
"""A measure's value, and the ends of its interval."""


@dataclass(frozen=True)
class EvaluationResult:
    """What came of an evaluation."""

    measurements: Sequence[Measurement]
    """All of the grid."""
    headlines: Sequence[Measurement]
    """For each measure the figures at the network's own setting, for a benchmark's first one also those at the exponent
    that the proxy task chose for each size, not whitened; and the best. Each once."""
    grids: Sequence[ResultGrid]
    """The first measure of each benchmark at every setting; none if there is but one size and one exponent."""
    notes: Sequence[str]
    """What a reader must know to believe the figures."""
    files: Sequence[Path]
    model: Path | None
    """Folder of the model that serves `Evaluation.serve`, which `predict.load` reads."""
    served: str | None
    """The name of its setting."""
    published: Sequence[PublishedResult]
    """All the paper's figures of what was measured, to compare with."""
    query_scores: Sequence[QueryScores]
    """What the measures are means of, where they are: of the network at its own setting, unless it serves another, and
    of `model`."""


def run_benchmarks(folder: Path, settings: Evaluation, out: Path, files: Files | None = None) -> EvaluationResult:
    """Evaluate the newest intact checkpoint below a training folder.

    Images pass through the trunk once for each size; retrieval sees them whole (`rect`), classification as the
    network's settings say at its own size, whole at others. What was embedded is kept below `out`: an evaluation
    that was cut short goes on there. Results come into `out` when all are there, in place of those of the evaluation
    before; `figures.csv` goes first and comes last.

    With a process group, every rank must call it. They share embeddings, queries and the sizes of the proxy task; rank
    0 alone fits whitenings, computes measures of the one ranking of all pairs, and writes results. All get its
    assessment.

    Args:
        folder: where `fit` left its checkpoints.
        settings: benchmarks and grid.
        out: folder for `figures.csv`, `proxy.csv`, `grid.png`, galleries, whitenings and `model`.
    Raises:
        FileNotFoundError: there is no intact checkpoint.
        DataError: a benchmark, a whitening or the proxy task cannot be evaluated, or the network knows other classes.
    """
    saved = checkpoint.latest(folder)
    if saved is None:
        raise FileNotFoundError(f"an evaluation needs a trained network, but {folder} holds no intact checkpoint")
    network, spec = network_of(saved)
    found = inputs(settings, saved.state["classes"], network.classifier.in_features, files)
    model = out / "model"
    if settings.serve and model.exists() and not served_setting.is_served(model):
        raise DataError([f"a model to serve goes to {model}, but something else is there; move it or name another out"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = _Run(network.to(device).requires_grad_(False), spec, settings, found, out, device)
    run.answers = None if served_setting.is_served(folder) else run.own
    try:
        run.begin()
        figures = [figure for size in run.sizes for figure in run.at_size(size)]
        return distributed.on_rank_zero(partial(run.finish, figures, saved))
    finally:
        if run.writes:
            shutil.rmtree(run.draft, ignore_errors=True)


class _Run:
    """One evaluation: what its steps share."""

    def __init__(
        self,
        network: MultiGrain,
        spec: MultiGrainSpec,
        settings: Evaluation,
        found: Inputs,
        out: Path,
        device: torch.device,
    ) -> None:
        self.network, self.spec, self.settings, self.found = network, spec, settings, found
        self.out, self.draft, self.device = out, out / ".draft", device
        self.writes = distributed.rank_and_size()[0] == 0
        own = max(1.0, float(network.pool.p))  # one that learns counts as 1 below 1
        self.own = Setting(spec.evaluation_size, own, False)
        serve = settings.serve
        joined = (serve.size,) if serve else ()
        self.sizes = tuple(dict.fromkeys((spec.evaluation_size, *(settings.sizes or ()), *joined)))
        wanted = [serve.p] if serve and isinstance(serve.p, float) else []
        named: dict[str, float] = {}
        for p in (own, *(settings.exponents or ()), *wanted):
            named.setdefault(f"{p:g}", p)  # figures could not be told apart where 2.2 was learnt as fp32 has it
        self.exponents = tuple(named.values())
        self.scores: dict[int, dict[float, proxy.Score]] = {}
        self.chosen: dict[int, float] = {}
        """p* of each size by the proxy task."""
        self.answers: Setting | None = None
        """The setting at which the network answers its users, if that is measured here."""
        self.served: Setting | None = None
        self.query_scores: list[QueryScores] = []
        self.data: dict[str, dict[str, str]] = {}
        """SHA-256 of each part of a benchmark, by the benchmark's name."""

    def begin(self) -> None:
        """Make room for results, and choose p*."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self.writes:
            shutil.rmtree(self.draft, ignore_errors=True)
            self.draft.mkdir()
        if self.found.proxy is not None:
            self.scores = dict(zip(self.sizes, distributed.share_work(self._proxy_scores), strict=True))
            self.chosen = {size: proxy.best(scores) for size, scores in self.scores.items()}
        if serve := self.settings.serve:
            p = self.chosen[serve.size] if serve.p == PROXY else self._of_grid(float(serve.p))
            self.served = Setting(serve.size, p, serve.whitened)

    def _of_grid(self, p: float) -> float:
        return next(one for one in self.exponents if f"{one:g}" == f"{p:g}")

    def _proxy_scores(self, share: slice) -> list[dict[float, proxy.Score]]:
        dataset = self.found.proxy
        assert dataset is not None
        rest = (self.exponents, self.device, self.settings.loaders)
        return [proxy.score(self.network, dataset, self.spec.augment, size, *rest) for size in self.sizes[share]]

    def at_size(self, size: int) -> Iterator[Measurement]:
        """The figures of one size: every image passes through the trunk once."""
        whitenings = self._whitenings(size)
        for benchmark in self.found.benchmarks:
            pictures = (*benchmark.database, *benchmark.queries)
            own = benchmark.labels is not None and size == self.own.size
            transform = self.spec.evaluation.transform if own else "rect"
            for p, embeddings in self._embed(pictures, size, transform).items():
                if benchmark.labels is not None:
                    yield from self._of_classes(benchmark, embeddings, Setting(size, p, False))
                    continue
                for whitening in (None, whitenings[p]) if whitenings else (None,):
                    descriptors = embed.descriptors(embeddings, whitening, self.out / "embeddings")
                    yield from self._of_parts(benchmark, descriptors, Setting(size, p, whitening is not None))

    def _embed(self, pictures: Sequence[Source], size: int, transform: EvaluationTransform) -> dict[float, Embeddings]:
        folder, loaders = self.out / "embeddings", self.settings.loaders
        return embed.embed(self.network, pictures, size, transform, self.exponents, self.device, loaders, folder)

    def _whitening_file(self, size: int, p: float) -> Path:
        return self.draft / f"whitening-{size}-p{p:g}.safetensors"

    def _whitenings(self, size: int) -> dict[float, Whitening]:
        if not self.found.whitening:
            return {}
        found = {}
        for p, embeddings in self._embed(self.found.whitening, size, "rect").items():
            fit = partial(Whitening.fit, torch.from_numpy(embeddings), self.settings.dimension)
            found[p] = distributed.on_rank_zero(fit)
            if self.writes:
                save_file(found[p].state_dict(), self._whitening_file(size, p))
        return found

    def _of_parts(self, benchmark: Benchmark, descriptors: Embeddings, at: Setting) -> Iterator[Measurement]:
        count = len(benchmark.database)
        database, queries = descriptors[:count], descriptors[count:]
        for part, truths in benchmark.truth.items():
            # A query from whose list everything is taken out belongs to other parts of the protocol.
            asked = [query for query, one in enumerate(truths) if len(one.junk) < count]
            truth, rows = [truths[query] for query in asked], queries[asked]
            ranks = distributed.share_work(partial(self._ranks, rows, database, truth))
            measured = {}
            for name in benchmark.measures:
                if MEASURES[name].source == "ranks":
                    values = MEASURES[name].values(ranks)
                    self._keep(benchmark, part, name, at, values)
                    measured[name] = float(values.mean()), interval(values)
            if len(measured) < len(benchmark.measures):
                measured |= distributed.on_rank_zero(partial(_of_pairs, benchmark, rows, database, truth, self.device))
            for measure in benchmark.measures:
                yield self._figure(benchmark, part, measure, at, *measured[measure])
            if at == self.own and self.writes:
                shown = replace(
                    benchmark, queries=tuple(benchmark.queries[query] for query in asked), truth={part: tuple(truth)}
                )
                gallery.page(self.draft / results.page_name(benchmark, part), shown, part, rows, database, ranks)

    def _ranks(
        self, rows: Embeddings, database: Embeddings, truth: Sequence[Truth], share: slice
    ) -> list[NDArray[np.int64]]:
        return ranking.ranks(rows[share], database, truth[share], self.device)

    def _of_classes(self, benchmark: Benchmark, embeddings: Embeddings, at: Setting) -> Iterator[Measurement]:
        logits = self.network.head(torch.from_numpy(embeddings).to(self.device)).logits.cpu().numpy()
        for name in benchmark.measures:
            values = MEASURES[name].values(logits, np.array(benchmark.labels))
            self._keep(benchmark, "", name, at, values)
            yield self._figure(benchmark, "", name, at, float(values.mean()), interval(values))

    def _keep(self, benchmark: Benchmark, part: str, measure: str, at: Setting, values: Floats) -> None:
        if not self.writes:
            return
        for setting, served in ((self.answers, False), (self.served, True)):
            if at == setting:
                if benchmark.name not in self.data:
                    self.data[benchmark.name] = digests(benchmark)
                name = Measurement(benchmark.name, part, measure, at, 0, 0, 0).name.removesuffix(f"/{at.name}")
                self.query_scores.append(
                    QueryScores(name, self.data[benchmark.name][part], tuple(values.tolist()), served)
                )

    def _figure(
        self, benchmark: Benchmark, part: str, measure: str, at: Setting, value: float, ends: tuple[float, float]
    ) -> Measurement:
        paper = published.paper(benchmark, part, measure, at.size, self.spec)
        return Measurement(benchmark.name, part, measure, at, value, *ends, paper)

    def finish(self, figures: Sequence[Measurement], saved: checkpoint.Checkpoint) -> EvaluationResult:
        """Write what is left to write, and put all results in place."""
        results.write_figures(self.draft / "figures.csv", figures)
        files = ["figures.csv"]
        shown = grids(figures) if len(self.sizes) * len(self.exponents) > 1 else []
        if shown:
            files.append(gallery.heat_map(self.draft / "grid.png", shown).name)
        if self.scores:
            results.write_proxy(self.draft / "proxy.csv", self.scores, self.chosen)
            files.append("proxy.csv")
        files += [results.page_name(benchmark, part) for benchmark in self.found.benchmarks for part in benchmark.truth]
        if at := self.served:
            state = load_file(self._whitening_file(at.size, at.p)) if at.whitened else None
            whitening = Whitening.from_state(state) if state else None
            served_setting.write(self.draft / "model", saved, served_setting.ServedSetting(at.size, at.p, whitening))
        results.put_in_place(self.draft, self.out)
        chosen = [Setting(size, p, False) for size, p in self.chosen.items()]
        return EvaluationResult(
            figures,
            headlines(figures, [self.own, *chosen]),
            shown,
            self._notes(),
            [self.out / name for name in files],
            self.out / "model" if self.served else None,
            self.served.name if self.served else None,
            [row for row, _ in self._published()],
            self.query_scores,
        )

    def _published(self) -> list[tuple[PublishedResult, Benchmark]]:
        return [
            (row, benchmark)
            for benchmark in self.found.benchmarks
            for part in (benchmark.truth or ("",))
            for measure in benchmark.measures
            for row in published.rows(benchmark, part, measure)
        ]

    def _notes(self) -> list[str]:
        notes = [
            f"p* = {p:g} at {size} pixels by the proxy task: mean of copy mAP {self.scores[size][p].copy_map:.2f} and "
            f"top-1 {self.scores[size][p].top1:.2f}"
            for size, p in self.chosen.items()
        ]
        notes += [f"{one.name} is not whole: {problem}" for one in self.found.benchmarks for problem in one.problems]
        pairs = ((benchmark, published.difference(benchmark, row)) for row, benchmark in self._published())
        others = {f"the paper's figures of {one.name} are of other images: {why}": None for one, why in pairs if why}
        return [*notes, *others]


def _of_pairs(
    benchmark: Benchmark, rows: Embeddings, database: Embeddings, truth: Sequence[Truth], device: torch.device
) -> dict[str, Result]:
    pairs = ranking.pairs(rows, database, truth, device)
    measures = {name: MEASURES[name].values for name in benchmark.measures if MEASURES[name].source == "pairs"}
    return {name: (float(of(pairs).mean()), interval(pairs, measure=of)) for name, of in measures.items()}

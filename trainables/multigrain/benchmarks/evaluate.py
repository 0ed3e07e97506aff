"""Evaluation of a trained network on benchmarks: each measure at each size and exponent, whitened or not."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from multigrain import distributed
from multigrain.benchmarks import gallery, proxy, published, results
from multigrain.benchmarks.inputs import Inputs, inputs
from multigrain.benchmarks.results import EvaluationResult, Measurement, QueryScores
from multigrain.config.evaluation import PROXY, Evaluation
from multigrain.config.training import MultiGrainSpec
from multigrain.data.loading import Source
from multigrain.data.transforms import EvaluationTransform
from multigrain.errors import DataError
from multigrain.evaluation import embed
from multigrain.evaluation.benchmark import Benchmark
from multigrain.evaluation.embed import Setting, SettingGrid
from multigrain.evaluation.measure import Embeddings, Retrieval, classify, retrieve
from multigrain.hooks import Files
from multigrain.models import checkpoint, served_setting
from multigrain.models.multigrain import MultiGrain, network_of
from multigrain.models.whitening import Whitening
from multigrain.retrieval import ranking
from multigrain.retrieval.metrics import MEASURES, Floats, interval

Values = Mapping[str, tuple[float, float, float]]
"""Measure -> its value, and the lower and the upper end of its interval."""


def run_benchmarks(folder: Path, settings: Evaluation, out: Path, files: Files | None = None) -> EvaluationResult:
    """Evaluate the newest intact checkpoint below a training folder.

    Images pass through the trunk once for each size. Retrieval sees them whole (`rect`); classification sees them as
    the network's settings say at its own size, whole at others. Embeddings are kept below `out`, and an evaluation that
    was cut short goes on from them. Results replace those of an earlier evaluation in `out` when all are computed.

    With a process group, every rank must call it. The ranks share embeddings, queries and the sizes of the proxy task;
    rank 0 alone fits whitenings, computes measures of the one ranking of all pairs, and writes results. All ranks
    return the result.

    Args:
        folder: where `fit` left its checkpoints.
        settings: benchmarks and grid.
        out: folder for `figures.csv`, `proxy.csv`, `grid.png`, galleries, whitenings and `model`.
        files: access to sources in S3.
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
    serve = (settings.serve,) if settings.serve else ()
    sizes = (*(settings.sizes or ()), *(one.size for one in serve))
    exponents = (*(settings.exponents or ()), *(one.p for one in serve if isinstance(one.p, float)))
    network = network.to(device).requires_grad_(False)
    grid = SettingGrid.of(network, spec, sizes, exponents)
    answers = None if served_setting.is_served(folder) else grid.own
    run = _Run(network, spec, settings, found, out, device, grid, answers)
    try:
        run.begin()
        measurements = [one for size in grid.sizes for one in run.at_size(size)]
        return distributed.on_rank_zero(partial(run.finish, measurements, saved))
    finally:
        if run.writes:
            shutil.rmtree(run.draft, ignore_errors=True)


@dataclass
class _Run:
    """State of an evaluation that its steps share."""

    network: MultiGrain
    spec: MultiGrainSpec
    settings: Evaluation
    inputs: Inputs
    out: Path
    device: torch.device
    grid: SettingGrid
    answers: Setting | None
    """Setting at which the network answers its users, None if that is not measured here."""
    scores: dict[int, dict[float, proxy.Score]] = field(default_factory=dict)
    """Size -> exponent -> score of the proxy task."""
    chosen: dict[int, float] = field(default_factory=dict)
    """Size -> p* by the proxy task."""
    served: Setting | None = None
    """Setting that the model made here serves."""
    query_scores: list[QueryScores] = field(default_factory=list)
    digests: dict[str, dict[str, str]] = field(default_factory=dict)
    """Benchmark -> part -> SHA-256, see `results.digests`."""

    def __post_init__(self) -> None:
        self.draft, self.writes = self.out / ".draft", distributed.rank_and_size()[0] == 0

    def begin(self) -> None:
        """Make room for results, and choose p*."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self.writes:
            shutil.rmtree(self.draft, ignore_errors=True)
            self.draft.mkdir()
        if self.inputs.proxy is not None:
            self.scores = dict(zip(self.grid.sizes, distributed.share_work(self._proxy_scores), strict=True))
            self.chosen = {size: proxy.best(scores) for size, scores in self.scores.items()}
        if serve := self.settings.serve:
            p = self.chosen[serve.size] if serve.p == PROXY else self.grid.exponent(float(serve.p))
            self.served = Setting(serve.size, p, serve.whitened)

    def _proxy_scores(self, share: slice) -> list[dict[float, proxy.Score]]:
        dataset = self.inputs.proxy
        assert dataset is not None
        rest = (self.grid.exponents, self.device, self.settings.loaders)
        return [proxy.score(self.network, dataset, self.spec.augment, size, *rest) for size in self.grid.sizes[share]]

    def at_size(self, size: int) -> Iterator[Measurement]:
        """Measure all benchmarks at one size; every image passes through the trunk once."""
        whitenings = self._whitenings(size)
        for benchmark in self.inputs.benchmarks:
            pictures = (*benchmark.database, *benchmark.queries)
            own = benchmark.labels is not None and size == self.grid.own.size
            transform = self.spec.evaluation.transform if own else "rect"
            for p, embeddings in self._embed(pictures, size, transform).items():
                if benchmark.labels is not None:
                    scores = classify(benchmark, self.network, embeddings, self.device)
                    yield from self._measurements(benchmark, "", Setting(size, p, False), scores, {})
                    continue
                for whitening in (None, whitenings[p]) if whitenings else (None,):
                    descriptors = embed.descriptors(embeddings, whitening, self.out / "embeddings")
                    yield from self._of_retrieval(benchmark, descriptors, Setting(size, p, whitening is not None))

    def _embed(self, pictures: Sequence[Source], size: int, transform: EvaluationTransform) -> dict[float, Embeddings]:
        folder, loaders = self.out / "embeddings", self.settings.loaders
        return embed.embed(self.network, pictures, size, transform, self.grid.exponents, self.device, loaders, folder)

    def _whitening_file(self, size: int, p: float) -> Path:
        return self.draft / f"whitening-{size}-p{p:g}.safetensors"

    def _whitenings(self, size: int) -> dict[float, Whitening]:
        if not self.inputs.whitening:
            return {}
        found = {}
        for p, embeddings in self._embed(self.inputs.whitening, size, "rect").items():
            fit = partial(Whitening.fit, torch.from_numpy(embeddings), self.settings.dimension)
            found[p] = distributed.on_rank_zero(fit)
            if self.writes:
                save_file(found[p].state_dict(), self._whitening_file(size, p))
        return found

    def _of_retrieval(self, benchmark: Benchmark, descriptors: Embeddings, at: Setting) -> Iterator[Measurement]:
        count = len(benchmark.database)
        for part in benchmark.truth:
            found = retrieve(benchmark, part, descriptors[:count], descriptors[count:], self.device)
            of_pairs: Values = {}
            if len(found.values) < len(benchmark.measures):
                of_pairs = distributed.on_rank_zero(partial(_of_pairs, found, part, self.device))
            yield from self._measurements(benchmark, part, at, found.values, of_pairs)
            if at == self.grid.own and self.writes:
                gallery.page(self.draft / results.page_name(benchmark, part), found, f"{benchmark.name} {part}".strip())

    def _measurements(
        self, benchmark: Benchmark, part: str, at: Setting, scores: Mapping[str, Floats], of_pairs: Values
    ) -> Iterator[Measurement]:
        """Yield a measurement for each measure of a benchmark, in order, and keep the scores of its queries."""
        for measure in benchmark.measures:
            if measure in scores:
                self._keep(benchmark, part, measure, at, scores[measure])
                values = (float(scores[measure].mean()), *interval(scores[measure]))
            else:
                values = of_pairs[measure]
            paper = published.paper(benchmark, part, measure, at.size, self.spec)
            yield Measurement(benchmark.name, part, measure, at, *values, paper)

    def _keep(self, benchmark: Benchmark, part: str, measure: str, at: Setting, scores: Floats) -> None:
        if not self.writes:
            return
        for setting, served in ((self.answers, False), (self.served, True)):
            if at == setting:
                if benchmark.name not in self.digests:
                    self.digests[benchmark.name] = results.digests(benchmark)
                name, data = results.measure_name(benchmark.name, part, measure), self.digests[benchmark.name][part]
                self.query_scores.append(QueryScores(name, data, tuple(scores.tolist()), served))

    def finish(self, measurements: Sequence[Measurement], saved: checkpoint.Checkpoint) -> EvaluationResult:
        """Write the remaining files, and put all results in place."""
        results.write_measurements(self.draft / "figures.csv", measurements)
        files = ["figures.csv"]
        grids = results.grids(measurements) if len(self.grid.sizes) * len(self.grid.exponents) > 1 else []
        if grids:
            files.append(gallery.heat_map(self.draft / "grid.png", grids).name)
        if self.scores:
            results.write_proxy(self.draft / "proxy.csv", self.scores, self.chosen)
            files.append("proxy.csv")
        files += [
            results.page_name(benchmark, part) for benchmark in self.inputs.benchmarks for part in benchmark.truth
        ]
        if at := self.served:
            state = load_file(self._whitening_file(at.size, at.p)) if at.whitened else None
            whitening = Whitening.from_state(state) if state else None
            served_setting.write(self.draft / "model", saved, served_setting.ServedSetting(at.size, at.p, whitening))
        results.put_in_place(self.draft, self.out)
        chosen = [Setting(size, p, False) for size, p in self.chosen.items()]
        headlines = results.headlines(measurements, [self.grid.own, *chosen])
        tables = [results.headline_table(headlines), *map(results.grid_table, grids)]
        return EvaluationResult(
            measurements,
            headlines,
            tables + published.tables([row for row, _ in self._published()]),
            self._notes(),
            [self.out / name for name in files],
            self.out / "model" if self.served else None,
            self.served.name if self.served else None,
            self.query_scores,
        )

    def _published(self) -> list[tuple[published.PublishedResult, Benchmark]]:
        return [
            (row, benchmark)
            for benchmark in self.inputs.benchmarks
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
        sets = self.inputs.benchmarks
        notes += [f"{one.name} is not the published set: {problem}" for one in sets for problem in one.problems]
        pairs = ((benchmark, published.difference(benchmark, row)) for row, benchmark in self._published())
        others = {f"the paper's values for {one.name} are of other images: {why}": None for one, why in pairs if why}
        return [*notes, *self.inputs.problems, *others]


def _of_pairs(found: Retrieval, part: str, device: torch.device) -> Values:
    """Compute the measures of the one ranking of all pairs, and their intervals."""
    benchmark = found.benchmark
    pairs = ranking.pairs(found.queries, found.database, benchmark.truth[part], device)
    measures = {name: MEASURES[name].values for name in benchmark.measures if MEASURES[name].source == "pairs"}
    return {name: (float(of(pairs).mean()), *interval(pairs, measure=of)) for name, of in measures.items()}

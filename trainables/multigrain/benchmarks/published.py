"""Results that the paper reports, to compare with (arXiv:1902.05509v2)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from multigrain.benchmarks.results import ResultTable
from multigrain.config.training import MultiGrainSpec
from multigrain.evaluation.benchmark import Benchmark


class PublishedResult(NamedTuple):
    """The value of one measure that the paper reports for one network."""

    benchmark: str
    """Name in `config.evaluation.BENCHMARKS`."""
    setting: str
    """A key of `Benchmark.truth`; "" where the protocol has but one part, or none."""
    distractors: int
    """Images added to the database of the set: 10,000 of YFCC100M in Copydays+10k."""
    measure: str
    """Name in `Benchmark.measures`."""
    size: int
    """s*, in pixels."""
    method: str
    weight: float | None
    """lambda, the weight of classification; None: trained without the margin loss."""
    p: float
    """Pooling exponent in training; 1 is average pooling."""
    value: float
    """Percentages of the paper are shares of 1 here."""
    source: str
    """Table of the paper."""


SIZES = (224, 500, 800)
COPYDAYS_ORIGINALS = 157

# method, lambda, p; then for each size Holidays mAP in percent, UKBench, Copydays+10k mAP in percent
_RETRIEVAL = (
    ("PyTorch zoo", None, 1, (85.5, 86.6, 82.8), (3.71, 3.85, 3.80), (61.5, 61.1, 43.0)),
    ("ResNet-50", None, 1, (83.5, 88.8, 87.1), (3.60, 3.79, 3.82), (59.2, 69.9, 66.2)),
    ("ResNet-50", None, 3, (86.8, 90.0, 90.4), (3.73, 3.87, 3.89), (70.6, 78.9, 75.7)),
    ("MultiGrain", 1, 3, (88.9, 91.8, 91.6), (3.78, 3.89, 3.91), (75.1, 81.2, 82.5)),
    ("MultiGrain", 0.5, 3, (88.3, 91.5, 92.5), (3.78, 3.90, 3.91), (74.1, 80.7, 78.6)),
    ("MultiGrain + AutoAugment", 0.5, 3, (86.5, 90.3, 89.4), (3.75, 3.89, 3.90), (69.7, 77.8, 76.1)),
)

# method, lambda, size; then top-1 and top-5 in percent for p = 1 and p = 3
_CLASSIFICATION = (
    ("ResNet-50", None, 224, (76.2, 92.9), (76.2, 93.1)),
    ("MultiGrain", 1, 224, (76.8, 93.2), (76.9, 93.5)),
    ("MultiGrain", 0.5, 224, (77.0, 93.6), (77.4, 93.6)),
    ("MultiGrain + AutoAugment", 0.5, 224, (77.4, 93.6), (78.2, 93.9)),
    ("MultiGrain", 0.5, 500, (76.5, 93.5), (78.6, 94.4)),
    ("MultiGrain + AutoAugment", 0.5, 500, (77.7, 94.0), (79.4, 94.8)),
    ("MultiGrain", 0.5, 800, (73.5, 93.5), (77.2, 93.5)),  # 93.5 at p = 1 is as printed, and looks like a slip
    ("MultiGrain + AutoAugment", 0.5, 800, (74.1, 91.8), (77.8, 93.9)),
)


def _rows() -> Iterator[PublishedResult]:
    for method, weight, p, holidays, ukbench, copydays in _RETRIEVAL:
        for size, map_, ukb, copies in zip(SIZES, holidays, ukbench, copydays, strict=True):
            setup, source = (size, method, weight, p), "Table D.1"
            yield PublishedResult("holidays", "", 0, "map", *setup, round(map_ / 100, 3), source)
            yield PublishedResult("ukbench", "", 0, "ukb", *setup, ukb, source)
            yield PublishedResult("copydays", "strong", 10_000, "map", *setup, round(copies / 100, 3), source)
    for method, weight, size, *by_p in _CLASSIFICATION:
        for p, (top1, top5) in zip((1, 3), by_p, strict=True):
            for measure, share in (("top1", top1), ("top5", top5)):
                setup = (size, method, weight, p)
                yield PublishedResult("imagenet", "", 0, measure, *setup, round(share / 100, 3), "Table 2")


PUBLISHED = tuple(_rows())


def rows(benchmark: Benchmark, part: str, measure: str) -> list[PublishedResult]:
    """Return the paper's results of one measure, for all networks and sizes."""
    wanted = (benchmark.name, part, measure)
    return [row for row in PUBLISHED if (row.benchmark, row.setting, row.measure) == wanted]


def difference(benchmark: Benchmark, row: PublishedResult) -> str:
    """Say how the paper's images differ from those of a benchmark; empty if they are the same."""
    if not benchmark.as_published:
        return "the set here is not the published one"
    distractors = len(benchmark.database) - COPYDAYS_ORIGINALS if row.distractors else 0
    if row.distractors == distractors:
        return ""
    return f"they are with {row.distractors:,} distractors, and here are {distractors:,}"


def paper(benchmark: Benchmark, part: str, measure: str, size: int, spec: MultiGrainSpec) -> float | None:
    """Return the paper's value for its network of this lambda and p; None where trunk, images or database differ."""
    wanted = ("MultiGrain", "resnet50", size, spec.loss.weight, spec.model.p)
    for row in rows(benchmark, part, measure):
        here = (row.method, spec.model.trunk, row.size, row.weight, row.p)
        if here == wanted and not difference(benchmark, row):
            return row.value
    return None


def tables(results: Sequence[PublishedResult]) -> list[ResultTable]:
    """Arrange results of the paper in tables, one for each part of a benchmark."""
    cells: dict[str, list[tuple[str, ...]]] = {}
    for row in results:
        distractors = f"with {row.distractors:,} distractors" if row.distractors else ""
        title = " ".join(part for part in ("published:", row.benchmark, row.setting, distractors) if part)
        weight = "" if row.weight is None else f"{row.weight:g}"
        cells.setdefault(title, []).append(
            (row.method, weight, f"{row.p:g}", str(row.size), row.measure, f"{row.value:.4f}", row.source)
        )
    columns = ("method", "lambda", "p", "size", "measure", "value", "source")
    return [ResultTable(title, columns, found) for title, found in cells.items()]

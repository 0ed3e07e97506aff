"""Measures of retrieval and classification: functions of ranks, of pairs or of logits, in NumPy."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.integer]
Floats: TypeAlias = NDArray[np.float64]

BLOCK = 2**22
"""Numbers that are in memory at a time where samples are drawn."""


class Truth(NamedTuple):
    """Right answers to a query. An item in both lists is junk; an item in neither is a negative."""

    positives: NDArray[np.int64]
    """Indices of the database items that show the same as the query."""
    junk: NDArray[np.int64]
    """Indices of the items that are ignored, such as the query itself in some protocols."""


class Pairs(NamedTuple):
    """The M positive pairs in the one ranking of all pairs of a query and an item."""

    owner: NDArray[np.int64]
    """Query of each positive pair (M,), the highest score first."""
    above: NDArray[np.int32]
    """Number of each query's negatives that score at least as high as a positive pair, (Q, M)."""


def average_precision(ranks: Ints, num_positives: int | None = None) -> float:
    """Return the trapezoidal average precision of a query, as for Holidays, Copydays, (revisited) Oxford and Paris.

    AP = 1/n sum_j 1/2 [j / r_j + (j + 1) / (r_j + 1)], with j / r_j = 1 at r_j = 0 (Philbin et al., CVPR 2007;
    revisited: arXiv:1803.11285).

    Args:
        ranks: 0-based ranks of the retrieved positives, ascending, junk not counted.
        num_positives: n, by default the number of ranks; positives that were not retrieved add nothing.
    """
    j = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    return float((before + (j + 1) / (ranks + 1)).sum() / (2 * (num_positives or len(ranks))))


def average_precision_finite(ranks: Ints, num_positives: int | None = None) -> float:
    """Return the mean of the precisions at the positives of one query: 1/n sum_j (j + 1) / (r_j + 1).

    TREC and scikit-learn use it. It is larger than `average_precision`, which has the same arguments: one positive at
    rank 1 gives 0.5 instead of 0.25.
    """
    return float(((np.arange(len(ranks)) + 1) / (ranks + 1)).sum() / (num_positives or len(ranks)))


def average_precision_at_r(ranks: Ints) -> float:
    """Return `average_precision_finite` of the first R items, where R is the number of positives (arXiv:2003.08505)."""
    return average_precision_finite(ranks[ranks < len(ranks)], len(ranks))


def precision_at(k: int) -> Callable[[Ints], float]:
    """Return mP@k of the revisited Oxford and Paris (arXiv:1803.11285): the share of positives among the first k'.

    k' is the smaller of k and the rank of the last positive, counted from 1, so that a query with two positives can
    reach 1 at k = 10.
    """

    def precision(ranks: Ints) -> float:
        first = min(k, int(ranks[-1]) + 1)
        return float((ranks < first).sum() / first)

    return precision


def recall_at(k: int) -> Callable[[Ints], float]:
    """Return recall@k of metric learning: 1 if a positive is among the first k, else 0 (Jegou et al., PAMI 2011)."""
    return lambda ranks: float(ranks[0] < k)


def ukb(ranks: Ints) -> float:
    """Return UKBench's score: the number of the object's four images, the query included, among the first four.

    It is in [0, 4] (Nister and Stewenius, CVPR 2006).
    """
    return float((ranks < 4).sum())


def per_query(measure: Callable[[Ints], float]) -> Callable[[Sequence[Ints]], Floats]:
    """Apply a measure to each query with a positive: ranks of Q queries -> (A,), A at most Q, whose mean is reported.

    Queries without a positive are left out, as in the revisited Oxford and Paris. The returned function raises a
    ValueError if no query is left.
    """

    def values(ranks: Sequence[Ints]) -> Floats:
        found = np.array([measure(one) for one in ranks if len(one)], dtype=np.float64)
        if not len(found):
            raise ValueError(f"a mean needs a query with a positive, got none among {len(ranks)}; check the truth")
        return found

    return values


def _precisions(pairs: Pairs, times: Ints | None) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield blocks (B, m) of the positive pairs: how often each was drawn, positives up to it, and the precision."""
    if not len(pairs.owner):
        raise ValueError("a ranking of pairs needs a positive one, got none; check the truth")
    times = np.ones((1, len(pairs.above)), np.int64) if times is None else times
    # Below 2^24, counts are exact in fp32; only the ratio is rounded, which does not matter in a sample.
    most = int(times.sum(axis=1).max()) * int(pairs.above.max()) + int(times.max()) * len(pairs.owner)
    weights = times.astype(np.float32 if len(times) > 1 and most < 2**24 else np.float64)
    before = np.zeros((len(times), 1), weights.dtype)
    step = max(1, BLOCK // len(times))
    for block in (slice(start, start + step) for start in range(0, len(pairs.owner), step)):
        count = weights[:, pairs.owner[block]]
        right = before + count.cumsum(axis=1)
        wrong = weights @ pairs.above[:, block].astype(weights.dtype)
        yield count, right, right / np.maximum(right + wrong, 1)
        before = right[:, -1:]


def micro_ap(pairs: Pairs, times: Ints | None = None) -> Floats:
    """Return the micro-AP of copy detection: the finite-sum average precision of the one ranking of all pairs.

    See arXiv:2106.09672.

    Args:
        times: number of times each query is drawn in each of B samples, (B, Q); once by default.
    Returns:
        (B,), or (1,) without `times`; nan for a sample without a positive pair.
    Raises:
        ValueError: there is no positive pair.
    """
    area, total = np.zeros(1), np.zeros(1)
    for count, right, precision in _precisions(pairs, times):
        area, total = area + (count * precision).sum(axis=1), right[:, -1]
    return np.where(total > 0, area / np.maximum(total, 1), np.nan)


def recall_at_p90(pairs: Pairs, times: Ints | None = None) -> Floats:
    """Return the largest recall at a score threshold with a precision of at least 90 %, else 0 (arXiv:2106.09672).

    Arguments, result and errors are those of `micro_ap`.
    """
    reached, total = np.zeros(1), np.zeros(1)
    for _, right, precision in _precisions(pairs, times):
        reached, total = np.maximum(reached, np.where(precision >= 0.9, right, 0).max(axis=1)), right[:, -1]
    return np.where(total > 0, reached / np.maximum(total, 1), np.nan)


def top_at(k: int) -> Callable[[NDArray[np.floating], Ints], Floats]:
    """Return 1 where fewer than k other classes have a logit as high as the right class, else 0.

    Logits (N, K), labels (N,) -> (N,). Ties and nan count against the classifier.
    """

    def values(logits: NDArray[np.floating], labels: Ints) -> Floats:
        own = logits[np.arange(len(logits)), labels][:, None]
        return ((~(logits < own)).sum(axis=1) - 1 < k).astype(np.float64)

    return values


class Measure(NamedTuple):
    """Name of a measure's inputs, its function, and its description."""

    source: Literal["ranks", "pairs", "logits"]
    """Inputs of `values`: the ranks of Q queries, their `Pairs`, or logits (N, K) and labels (N,)."""
    values: Callable[..., Floats]
    """Function to values whose mean is the measure: one for `pairs`, otherwise one for each query or image."""
    description: str


def _ranked(measure: Callable[[Ints], float], description: str) -> Measure:
    return Measure("ranks", per_query(measure), description)


RECALLS = (1, 2, 4, 8, 10, 100, 1000)
PRECISIONS = (1, 5, 10)
MEASURES = {
    "map": _ranked(average_precision, "mean trapezoidal average precision, the literature's for Oxford, Paris, copies"),
    "map_finite": _ranked(average_precision_finite, "mean average precision as the finite sum of precisions"),
    "map@r": _ranked(average_precision_at_r, "mean average precision over as many items as there are positives"),
    **{f"recall@{k}": _ranked(recall_at(k), f"share of queries with a positive among the first {k}") for k in RECALLS},
    **{f"mp@{k}": _ranked(precision_at(k), f"mean share of positives among the first {k}") for k in PRECISIONS},
    "ukb": _ranked(ukb, "mean count of the object's images among the first four, at most 4"),
    "micro_ap": Measure("pairs", micro_ap, "average precision of the one ranking of all pairs of query and item"),
    "recall@p90": Measure("pairs", recall_at_p90, "recall of the one ranking of all pairs at a precision of 90 %"),
    "top1": Measure("logits", top_at(1), "share of images whose class has the highest logit"),
    "top5": Measure("logits", top_at(5), "share of images whose class has one of the five highest logits"),
}
"""Every measure by name; larger is better. All lie in [0, 1], `ukb` in [0, 4]."""


def same_label(labels: NDArray[Any]) -> list[Truth]:
    """Return the truth of items searched among each other: the item itself is junk, equal labels are positives."""
    _, which = np.unique(labels, return_inverse=True)
    members = np.split(np.argsort(which, kind="stable"), np.bincount(which).cumsum()[:-1])
    return [Truth(members[label], np.array([item])) for item, label in enumerate(which)]


def interval(
    sample: Floats | Pairs,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    measure: Callable[[Pairs, Any], Floats] = micro_ap,
) -> tuple[float, float]:
    """Return the ends of the bootstrap interval of a measure: percentiles over samples of queries with replacement.

    Args:
        sample: values (A,) whose mean is the measure, or `Pairs`.
        draws: number of samples of A queries, or of all Q; samples without a positive pair are left out.
        seed: the same seed gives the same interval.
        level: share of the draws inside the interval, in (0, 1).
        measure: for `Pairs`, `micro_ap` or `recall_at_p90`.
    Raises:
        ValueError: there is nothing to draw from, or `draws` or `level` is out of range.
    """
    count = len(sample.above) if isinstance(sample, Pairs) else len(sample)
    if not count or draws < 1 or not 0 < level < 1:
        raise ValueError(
            f"an interval needs a query, a draw and a level in (0, 1), got {count}, {draws} and {level}; set them so"
        )
    generator = np.random.default_rng(seed)
    if isinstance(sample, Pairs):
        times = np.stack([np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(draws)])
        found = measure(sample, times)
    else:
        step = max(1, BLOCK // count)
        steps = [min(step, draws - start) for start in range(0, draws, step)]
        found = np.concatenate([sample[generator.integers(count, size=(few, count))].mean(axis=1) for few in steps])
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

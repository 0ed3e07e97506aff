"""Measures of retrieval and classification: pure functions of ranks, of pairs and of logits, in numpy.

`multigrain.retrieval.ranking` makes ranks and pairs of descriptors.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.integer]
Floats: TypeAlias = NDArray[np.float64]


BLOCK = 2**22
"""Numbers that are held at a time where samples are drawn."""


class Truth(NamedTuple):
    """What a query should find. An item that is positive and junk is junk; one that is neither is a negative."""

    positives: NDArray[np.int64]
    """Indices into the database of what shows what the query shows."""
    junk: NDArray[np.int64]
    """Indices of items that are taken out of the query's list, the query itself where the protocol says so."""


class Pairs(NamedTuple):
    """The one ranking of all pairs of a query and an item, as far as measures need it: its M positive pairs."""

    owner: NDArray[np.int64]
    """(M,), the query of each positive pair, the highest score first."""
    above: NDArray[np.int32]
    """(Q, M), how many of each query's negatives score at least as high as a positive pair."""


def average_precision(ranks: Ints, num_positives: int | None = None) -> float:
    """Trapezoidal average precision of one query: that of Holidays, Copydays and Oxford/Paris, old and revisited.

    AP = 1/n sum_j 1/2 [j / r_j + (j + 1) / (r_j + 1)], with j / r_j = 1 at r_j = 0 (Philbin et al., CVPR 2007;
    revisited: arXiv:1803.11285).

    Args:
        ranks: 0-based ranks of the retrieved positives, ascending, junk not counted.
        num_positives: n, by default as many as there are ranks; positives that were not retrieved add nothing.
    """
    j = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    return float((before + (j + 1) / (ranks + 1)).sum() / (2 * (num_positives or len(ranks))))


def average_precision_finite(ranks: Ints, num_positives: int | None = None) -> float:
    """Average precision of one query as the mean of the precisions at its positives: 1/n sum_j (j + 1) / (r_j + 1).

    That of TREC and of scikit-learn. It is the larger one: one positive at rank 1 has 0.5 here, 0.25 above.
    Arguments are those of `average_precision`.
    """
    return float(((np.arange(len(ranks)) + 1) / (ranks + 1)).sum() / (num_positives or len(ranks)))


def average_precision_at_r(ranks: Ints) -> float:
    """`average_precision_finite` over the first R items alone, R being the number of positives (arXiv:2003.08505)."""
    return average_precision_finite(ranks[ranks < len(ranks)], len(ranks))


def precision_at(k: int) -> Callable[[Ints], float]:
    """mP@k of the revisited Oxford and Paris (arXiv:1803.11285): the share of positives among the first k'.

    k' is the smaller of k and the rank of the last positive, counted from 1: a query with two positives can have 1
    at k = 10.
    """

    def precision(ranks: Ints) -> float:
        first = min(k, int(ranks[-1]) + 1)
        return float((ranks < first).sum() / first)

    return precision


def recall_at(k: int) -> Callable[[Ints], float]:
    """Recall@k of metric learning: 1 if a positive is among the first k, else 0 (Jegou et al., PAMI 2011)."""
    return lambda ranks: float(ranks[0] < k)


def ukb(ranks: Ints) -> float:
    """UKBench's score: how many of the object's four images are among the first four, the query being one of them.

    In [0, 4] (Nister and Stewenius, CVPR 2006).
    """
    return float((ranks < 4).sum())


def per_query(
    measure: Callable[[Ints], float],
) -> Callable[[Sequence[Ints]], Floats]:
    """The measure of each query that has a positive: ranks of Q queries -> (A,), A at most Q, whose mean is reported.

    Queries without a positive are left out, as in the revisited Oxford and Paris. The function that is
    returned raises a ValueError where none is left.
    """

    def values(ranks: Sequence[Ints]) -> Floats:
        found = np.array([measure(one) for one in ranks if len(one)], dtype=np.float64)
        if not len(found):
            raise ValueError(f"a mean needs a query with a positive, got none among {len(ranks)}; check the truth")
        return found

    return values


def _precisions(pairs: Pairs, times: Ints | None) -> Iterator[tuple[NDArray[Any], ...]]:
    """Of the global ranking at each positive pair, (B, m), by blocks of m: how often that pair is there, how many
    positive ones there are so far, and the precision.
    """
    if not len(pairs.owner):
        raise ValueError("a ranking of pairs needs a positive one, got none; check the truth")
    times = np.ones((1, len(pairs.above)), np.int64) if times is None else times
    # Counts are exact in fp32 below 2^24; what is left is its rounding of a ratio, which no sample minds.
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
    """Micro-AP of copy detection: the finite-sum average precision of the one ranking of all pairs (arXiv:2106.09672).

    Args:
        times: (B, Q), how often each query is drawn in each of B samples; once by default.
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
    """The largest recall at a threshold of the score that leaves a precision of 90 % or more (arXiv:2106.09672).

    Arguments, result and errors are those of `micro_ap`; 0 if no threshold does.
    """
    reached, total = np.zeros(1), np.zeros(1)
    for _, right, precision in _precisions(pairs, times):
        reached, total = np.maximum(reached, np.where(precision >= 0.9, right, 0).max(axis=1)), right[:, -1]
    return np.where(total > 0, reached / np.maximum(total, 1), np.nan)


def top_at(k: int) -> Callable[[NDArray[np.floating], Ints], Floats]:
    """Whether fewer than k other classes have a logit as high as the right one: logits (N, K), labels (N,) -> (N,).

    Ties, and what is not a number, go against the classifier.
    """

    def values(logits: NDArray[np.floating], labels: Ints) -> Floats:
        own = logits[np.arange(len(logits)), labels][:, None]
        return ((~(logits < own)).sum(axis=1) - 1 < k).astype(np.float64)

    return values


class Measure(NamedTuple):
    """How a measure is computed, and what it is."""

    source: Literal["ranks", "pairs", "logits"]
    """What `values` takes: the ranks of Q queries, their `Pairs`, or logits (N, K) and labels (N,)."""
    values: Callable[..., Floats]
    """Numbers whose mean is the measure: of `pairs` one, otherwise one a query or image, as `interval` takes them."""
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
    """The truth of items that are searched among each other: those of the same label are positives, itself is junk."""
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
    """Bootstrap interval of a measure, queries drawn with replacement: percentiles of its values over the draws.

    Args:
        sample: (A,) values whose mean is the measure, or `Pairs`.
        draws: how many samples of A, or of all Q, queries.
        seed: the same one gives the same interval.
        level: in (0, 1), the share of the draws inside.
        measure: of `Pairs`, `micro_ap` or `recall_at_p90`.
    Returns:
        The lower and the upper end. Samples without a positive pair are left out.
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

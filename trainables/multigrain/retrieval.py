"""Retrieval metrics: pure functions on arrays."""

import numpy as np
from numpy.typing import NDArray


def average_precision(ranks: NDArray[np.integer], num_positives: int) -> float:
    """Trapezoidal average precision of one query, as used for Holidays, Copydays and Oxford/Paris.

    AP = 1/n sum_j 1/2 [j / r_j + (j + 1) / (r_j + 1)], with j / r_j = 1 at r_j = 0. Other texts use the
    sum of precisions alone, which is larger: one positive at rank 1 has 0.25 here, 0.5 there.

    Args:
        ranks: 0-based ranks of the retrieved positives, ascending, junk not counted.
        num_positives: n, at least 1; positives that were not retrieved add nothing.
    """
    j = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    return float((before + (j + 1) / (ranks + 1)).sum() / (2 * num_positives))


def positive_ranks(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> NDArray[np.int64]:
    """0-based ranks of the positives of one query, ascending.

    The rank of a positive is the number of negatives that score as high, plus the positives before it:
    ties go against the query, so that a network that maps all images to one point finds nothing.
    What is not a number scores lowest.

    Args:
        scores: (D,) higher is nearer.
        positive: (D,).
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    positives = np.sort(scores[positive])[::-1]
    negatives = np.sort(scores[~positive])
    return len(negatives) - np.searchsorted(negatives, positives, side="left") + np.arange(len(positives))


def mean_average_precision(
    queries: NDArray[np.floating],
    database: NDArray[np.floating],
    positive: NDArray[np.bool_],
    junk: NDArray[np.bool_] | None = None,
) -> float:
    """Mean of `average_precision` over the queries that have a positive.

    Args:
        queries: (Q, C) descriptors.
        database: (D, C) descriptors; compared by dot product.
        positive: (Q, D), whether an item shows what the query shows.
        junk: (Q, D), items to be taken out of a query's list, such as the query itself.
    Returns:
        In [0, 1].
    Raises:
        ValueError: no query has a positive.
    """
    keep = np.ones_like(positive) if junk is None else ~junk
    positive = positive & keep
    answerable = np.flatnonzero(positive.any(axis=1))
    if not len(answerable):
        raise ValueError("mean average precision needs a query with a positive, got none")
    # In fp64, rounded to fp32: equal descriptors then tie wherever they stand in the matrix.
    scores = (queries.astype("f8") @ database.astype("f8").T).astype("f4")
    precisions = [
        average_precision(positive_ranks(scores[q][keep[q]], positive[q][keep[q]]), int(positive[q].sum()))
        for q in answerable
    ]
    return float(np.mean(precisions))

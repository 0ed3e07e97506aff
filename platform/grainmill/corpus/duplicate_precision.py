"""Precision of a list of duplicates, estimated from the embeddings of the corpus alone.

The estimate needs no labels. Most images of a corpus have few copies, so the neighbours from rank `COPIES` + 1 to rank
`NEIGHBOURS` of an image are taken for different images. The number of different images within a distance grows as a
power of the distance; the exponent, the local dimension, is fitted to these neighbours of each image (Levina and Bickel
2004). All exponents are then scaled to fit the nearest neighbours: if at least half of the images have no copy, the
median ratio of two distances, to the neighbour after the copies and to the nearest one, is that of different images or
larger. At smaller distances the exponent grows, as for random unit vectors, or stays. All errors have the same sign:
the expected number of pairs of different images above a score is too high, and the precision, the share of the other
pairs in the list, is too low.

One case cannot be distinguished from copies: a series of up to `COPIES` + 1 different images that are much nearer to
each other than to all others, such as pictures that a camera took within a second.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

COPIES, NEIGHBOURS = 5, 50
SAMPLE = 4096
"""Number of images that the estimate uses, spread evenly over the corpus."""
_STEPS = 2001
"""Number of scores at which the estimate is computed; it is interpolated between them."""

_MEDIAN = -np.log1p(-(0.5 ** (1 / COPIES)))
"""Median gap between the best and the last of `COPIES` + 1 draws from an exponential tail, in units of its scale."""
_SMALLEST = 1e-3
"""Smallest scale of a tail; it stands for a dimension that no embedding has."""
_ROUNDING = 2.0**-22
"""Rounding error of 1 - score in fp32."""

Floats: TypeAlias = NDArray[np.floating]


class NullModel(NamedTuple):
    """Distribution of the scores of different images around n images of a corpus: a tail for each."""

    start: Floats
    """(n,), depth of the neighbour after the copies, where the tail begins."""
    scale: Floats
    """(n,), scale of the exponential tail of depths: 2 / dimension."""
    images: int
    """Number of images in the corpus."""

    def false_pairs(self, scores: Floats) -> Floats:
        """Expected number of pairs of different images in the corpus that reach each score."""
        grid = np.unique(scores)
        grid = grid[np.linspace(0, len(grid) - 1, min(len(grid), _STEPS)).round().astype(int)]
        with np.errstate(over="ignore"):
            tails = [(COPIES + 1) * np.exp((self.start - one) / self.scale) for one in depth(grid)]
        expected = [np.minimum(tail, self.images - 1).mean() * self.images / 2 for tail in tails]
        return np.exp(np.interp(scores, grid, np.log(np.maximum(expected, 1e-300))))

    def score_of(self, pairs: float) -> float:
        """Lowest score, on a grid, that at most the expected number `pairs` of pairs of different images reach."""
        grid = 1 - np.geomspace(2, _ROUNDING, _STEPS)
        enough = np.flatnonzero(self.false_pairs(grid) <= pairs)
        return float(grid[enough[0]]) if len(enough) else 1.0


def depth(scores: Floats) -> Floats:
    """-log(1 - score): for unit vectors, -2 times the logarithm of their distance, plus a constant."""
    return -np.log(np.maximum(1 - np.asarray(scores, float), _ROUNDING))


def sample(images: int) -> NDArray[np.int64]:
    """Positions of the images that the estimate uses."""
    return np.unique(np.linspace(0, images - 1, min(images, SAMPLE)).round().astype(np.int64))


def fit_null_model(scores: Floats, images: int) -> NullModel:
    """Fit the tails to the scores (n, `NEIGHBOURS`) of the nearest neighbours of n images, best first."""
    ranks = np.arange(COPIES + 1, NEIGHBOURS)
    # Gaps of an exponential tail, times their rank, are independent draws of its scale (Rényi).
    depths = depth(scores)
    gaps = (depths[:, COPIES:-1] - depths[:, COPIES + 1 :]) * ranks
    scale = np.maximum(gaps.mean(axis=1, dtype=float), _SMALLEST)
    fit = np.median((depths[:, 0] - depths[:, COPIES]) / scale) / _MEDIAN
    return NullModel(depths[:, COPIES], np.maximum(scale * min(1.0, fit), _SMALLEST), images)


def precision(scores: Floats, model: NullModel) -> Floats:
    """Estimated precision of a list of pairs down to each pair, in [0, 1], not rising.

    Args:
        scores: scores of the pairs, best first; the list has all pairs that reach the last score.
        model: the null model of the corpus.
    """
    if not len(scores):
        return np.empty(0)
    listed = np.searchsorted(-scores, -scores, side="right")
    estimate = np.clip(1 - model.false_pairs(scores) / listed, 0, 1)
    return np.maximum.accumulate(estimate[::-1])[::-1]

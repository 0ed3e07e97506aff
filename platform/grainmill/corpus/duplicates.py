"""How many of the pairs above a score are no copies: an estimate from the embeddings alone.

Nobody has said which images of a corpus are copies. But most have few, so that the neighbours of an image from the
`COPIES` + first to the `NEIGHBOURS` th are taken for different images. How many lie within a distance grows as a power
of it, the local dimension; that of each image is fitted to these neighbours (Levina and Bickel 2004). All powers are
then scaled to fit the nearest neighbours: if half of the images or more have no copy, the median ratio between the
distances of an image's neighbour after `COPIES` and of its nearest is one of different images, or larger. Closer in,
the power rises, as it does for random unit vectors, or stays. So all errs to one side: too many pairs of different
images are expected above a score, and the precision, the share of the listed pairs that remains, is too low rather than
too high.

What this cannot tell from copies: a series of up to `COPIES` + 1 different images that are much nearer to each other
than to all others, such as those of a camera that takes several pictures a second.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

COPIES, NEIGHBOURS = 5, 50
SAMPLE = 4096
"""Images that the estimate is made of, spread evenly."""
_STEPS = 2001
"""Scores at which it is computed; where there are more, it is interpolated between them."""

_MEDIAN = -np.log1p(-(0.5 ** (1 / COPIES)))
"""Of the distance from the best of `COPIES` + 1 draws to the last, in scales of an exponential tail."""
_SMALLEST = 1e-3
"""Scale, of a dimension that no embedding has."""
_ROUNDING = 2.0**-22
"""Of 1 - score in fp32."""

Floats: TypeAlias = NDArray[np.floating]


class NullModel(NamedTuple):
    """The tails of different images around n images of a corpus."""

    start: Floats
    """(n,), the depth of the neighbour after the copies."""
    scale: Floats
    """(n,), of the exponential tail of depths there: 2 / dimension."""
    images: int
    """In the corpus."""

    def false_pairs(self, scores: Floats) -> Floats:
        """Expected number of pairs of different images in the corpus that reach each score."""
        grid = np.unique(scores)
        grid = grid[np.linspace(0, len(grid) - 1, min(len(grid), _STEPS)).round().astype(int)]
        with np.errstate(over="ignore"):
            tails = [(COPIES + 1) * np.exp((self.start - one) / self.scale) for one in depth(grid)]
        expected = [np.minimum(tail, self.images - 1).mean() * self.images / 2 for tail in tails]
        return np.exp(np.interp(scores, grid, np.log(np.maximum(expected, 1e-300))))

    def score_of(self, pairs: float) -> float:
        """The lowest score of some `_STEPS` that no more than so many pairs of different images reach."""
        grid = 1 - np.geomspace(2, _ROUNDING, _STEPS)
        enough = np.flatnonzero(self.false_pairs(grid) <= pairs)
        return float(grid[enough[0]]) if len(enough) else 1.0


def depth(scores: Floats) -> Floats:
    """-log(1 - score): of unit vectors, twice the negative logarithm of their distance, and a constant."""
    return -np.log(np.maximum(1 - np.asarray(scores, float), _ROUNDING))


def sample(images: int) -> NDArray[np.int64]:
    """Positions of the images that the estimate is made of."""
    return np.unique(np.linspace(0, images - 1, min(images, SAMPLE)).round().astype(np.int64))


def fit_null_model(scores: Floats, images: int) -> NullModel:
    """The tails, from the scores (n, `NEIGHBOURS`) of the nearest neighbours of n images, best first."""
    ranks = np.arange(COPIES + 1, NEIGHBOURS)
    # Gaps of an exponential tail, times their rank, are independent draws of its scale (Rényi).
    depths = depth(scores)
    gaps = (depths[:, COPIES:-1] - depths[:, COPIES + 1 :]) * ranks
    scale = np.maximum(gaps.mean(axis=1, dtype=float), _SMALLEST)
    fit = np.median((depths[:, 0] - depths[:, COPIES]) / scale) / _MEDIAN
    return NullModel(depths[:, COPIES], np.maximum(scale * min(1.0, fit), _SMALLEST), images)


def precision(scores: Floats, tails: NullModel) -> Floats:
    """Estimated precision of the list down to each of its pairs, in [0, 1], not rising.

    Args:
        scores: of all pairs that reach the last of them, best first.
        tails: of the corpus.
    """
    if not len(scores):
        return np.empty(0)
    listed = np.searchsorted(-scores, -scores, side="right")
    estimate = np.clip(1 - tails.false_pairs(scores) / listed, 0, 1)
    return np.maximum.accumulate(estimate[::-1])[::-1]

"""Exact search by dot product, block by block: the nearest rows, and all pairs of rows above a score.

A block is the position of its first row and its rows (n, D), float32. Memory is bounded by a few products of two
blocks, however many blocks there are.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.float32]
Block: TypeAlias = tuple[int, Rows]
Blocks: TypeAlias = Callable[[int], Iterable[Block]]
"""Maps the position of a row to the block with that row and all blocks after it."""

OUTER = 4096
"""Rows that are compared with all following rows in one pass over the blocks."""


class Pairs(NamedTuple):
    """Pairs of rows, best first."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    """Positions larger than those of `first`."""
    score: NDArray[np.float32]
    more: bool
    """True if pairs with lower scores were left out."""

    def pick(self, order: NDArray[np.integer], more: bool) -> Self:
        """Some of the pairs, in a given order."""
        return self._replace(first=self.first[order], second=self.second[order], score=self.score[order], more=more)


def top_k(queries: Rows, blocks: Iterable[Block], k: int) -> tuple[NDArray[np.int64], Rows]:
    """Positions and scores (Q, k) of the k best rows for each query, best first; all rows if there are fewer."""
    places: NDArray[np.int64] = np.empty((len(queries), 0), np.int64)
    scores: Rows = np.empty((len(queries), 0), np.float32)
    for start, rows in blocks:
        scores = np.concatenate([scores, queries @ rows.T], axis=1)
        new = np.broadcast_to(np.arange(start, start + len(rows)), (len(queries), len(rows)))
        places = np.concatenate([places, new], axis=1)
        if scores.shape[1] > k:
            best = np.argpartition(scores, -k, axis=1)[:, -k:]
            scores, places = np.take_along_axis(scores, best, axis=1), np.take_along_axis(places, best, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1), np.take_along_axis(scores, order, axis=1)


def pairs(blocks: Blocks, floor: float, most: int) -> Pairs:
    """All pairs of rows with a score of at least `floor`; the best ones if there are more than `most`."""
    found = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), False)
    for start, left in _merged(blocks(0), OUTER):
        for place, right in blocks(start):
            scores = left @ right.T
            rows, columns = np.nonzero(scores >= floor)
            once = rows + start < columns + place
            rows, columns = rows[once], columns[once]
            found = Pairs(
                np.concatenate([found.first, rows + start]),
                np.concatenate([found.second, columns + place]),
                np.concatenate([found.score, scores[rows, columns]]),
                found.more,
            )
            if len(found.score) > most:
                found = found.pick(np.argpartition(found.score, -most)[-most:], more=True)
                floor = float(found.score.min())
    return found.pick(np.lexsort((found.second, found.first, -found.score)), found.more)


def _merged(blocks: Iterable[Block], most: int) -> Iterator[Block]:
    """Merge consecutive blocks into blocks of up to `most` rows."""
    waiting: list[Rows] = []
    first = 0
    for start, rows in blocks:
        if waiting and sum(map(len, waiting)) + len(rows) > most:
            yield first, np.concatenate(waiting)
            waiting = []
        first = first if waiting else start
        waiting.append(rows)
    if waiting:
        yield first, np.concatenate(waiting)

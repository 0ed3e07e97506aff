"""Nearest items by dot product, and all pairs above a score: exact, a block at a time; arrays alone.

Embeddings are rows of float32. A block is the position of its first row, and its rows (n, D); memory is a few products
of two blocks, however many there are.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.float32]
Block: TypeAlias = tuple[int, Rows]
Blocks: TypeAlias = Callable[[int], Iterable[Block]]
"""The blocks from the one on that holds a row."""

OUTER = 4096
"""Rows that are compared with one reading of all that follow."""


class Pairs(NamedTuple):
    """Pairs of rows, the best first."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    """Of a larger number than the first."""
    score: NDArray[np.float32]
    more: bool
    """Whether there were more, which score less."""

    def of(self, order: NDArray[np.integer], more: bool) -> Self:
        """Some of them, in an order."""
        return self._replace(first=self.first[order], second=self.second[order], score=self.score[order], more=more)


def top_k(queries: Rows, blocks: Iterable[Block], k: int) -> tuple[NDArray[np.int64], Rows]:
    """Positions and scores (Q, k) of the k best rows for each query, best first; all rows if there are fewer."""
    places: NDArray[np.int64] = np.empty((len(queries), 0), np.int64)
    scores: Rows = np.empty((len(queries), 0), np.float32)
    for start, rows in blocks:
        found = np.concatenate([scores, queries @ rows.T], axis=1)
        new = np.broadcast_to(np.arange(start, start + len(rows)), (len(queries), len(rows)))
        where = np.concatenate([places, new], axis=1)
        if found.shape[1] > k:
            kept = np.argpartition(found, -k, axis=1)[:, -k:]
            found, where = np.take_along_axis(found, kept, axis=1), np.take_along_axis(where, kept, axis=1)
        scores, places = found, where
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1), np.take_along_axis(scores, order, axis=1)


def pairs(blocks: Blocks, floor: float, most: int) -> Pairs:
    """All pairs of rows that score `floor` or more; of more than `most`, the best."""
    kept = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), False)
    for start, left in _gathered(blocks(0), OUTER):
        for place, right in blocks(start):
            scores = left @ right.T
            rows, columns = np.nonzero(scores >= floor)
            once = rows + start < columns + place
            rows, columns = rows[once], columns[once]
            kept = Pairs(
                np.concatenate([kept.first, rows + start]),
                np.concatenate([kept.second, columns + place]),
                np.concatenate([kept.score, scores[rows, columns]]),
                kept.more,
            )
            if len(kept.score) > most:
                kept = kept.of(np.argpartition(kept.score, -most)[-most:], more=True)
                floor = float(kept.score.min())
    return kept.of(np.lexsort((kept.second, kept.first, -kept.score)), kept.more)


def _gathered(blocks: Iterable[Block], most: int) -> Iterator[Block]:
    """Blocks that follow each other, as one of up to so many rows."""
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

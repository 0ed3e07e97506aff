"""Equal images of an index: those with the same bytes or the same embedding, as groups."""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from grainmill.corpus.index import Index
from grainmill.corpus.nearest import Block


class EqualImages:
    """Groups of equal images. Memory and time grow with the images, not with the pairs."""

    def __init__(self, made: Index) -> None:
        self._made = made
        embeddings = (hashlib.sha256(row).digest() for _, rows in made.blocks() for row in rows)
        first: dict[str | bytes, int] = {}
        leaders: list[int] = []
        """Position of an equal image that comes earlier, or that of the image itself."""
        for position, keys in enumerate(zip(made.column("digest"), embeddings, strict=True)):
            leaders.append(position)
            found = [_root(leaders, first.setdefault(key, position)) for key in keys]
            for one in found:
                leaders[one] = min(found)
            leaders[position] = min(found)
        self.leader = np.array([_root(leaders, position) for position in range(len(leaders))], np.int64)
        """(n,), position of the first image of each image's group."""
        self.distinct = np.flatnonzero(self.leader == np.arange(len(self.leader)))
        """Positions of the images that are the first of their groups."""

    def groups(self) -> list[NDArray[np.int64]]:
        """Positions of the images of each group of at least two, the largest group first."""
        order = np.argsort(self.leader, kind="stable")
        found = np.split(order, np.flatnonzero(np.diff(self.leader[order])) + 1)
        return sorted((group for group in found if len(group) > 1), key=lambda group: (-len(group), group[0]))

    def blocks(self, start: int = 0) -> Iterable[Block]:
        """Positions in `distinct` and embeddings of distinct images, from the block with position `start` on."""
        for first, rows in self._made.blocks(int(self.distinct[start])):
            low, high = np.searchsorted(self.distinct, (first, first + len(rows)))
            if low < high:
                yield int(low), rows[self.distinct[low:high] - first]


def _root(leaders: list[int], position: int) -> int:
    while leaders[position] != position:
        leaders[position] = leaders[leaders[position]]
        position = leaders[position]
    return position

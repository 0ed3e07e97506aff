"""Dot products with a database in chunks, and exact counts of the products above a threshold."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multigrain.retrieval.metrics import Floats

NEAR = 1 / 128
"""Share of doubtful scores above which multiplying a whole block in fp64 costs less than single pairs."""
TINY = 2.0**-90
"""Lower bound on products of lengths, because smaller ones underflow in fp32."""

Descriptors: TypeAlias = Tensor | NDArray[np.floating]
Device: TypeAlias = torch.device | str | None
Indices: TypeAlias = NDArray[np.int64]


class Places(NamedTuple):
    """M pairs of a query of a chunk and an item, in the order of the queries."""

    query: Indices
    item: Indices


class Bounds(NamedTuple):
    """M thresholds on scores, in the order of the queries, descending for each query."""

    query: Indices
    value: Floats


class Chunk(NamedTuple):
    """Consecutive queries."""

    start: int
    """Position of the first one among all queries."""
    rows: Tensor
    """Descriptors (n, C), fp32."""
    lengths: Floats
    """L2 norms (n,)."""


def chunks(descriptors: Descriptors, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield the position of the first row, and rows (n, C) in fp32 on the device, n at most `size`."""
    for start in range(0, len(descriptors), size):
        yield start, _taken(descriptors[start : start + size], device)


def _taken(rows: Descriptors, device: torch.device) -> Tensor:
    # Torch warns of arrays that must not be written to, such as those mapped from a file.
    tensor = rows.detach() if isinstance(rows, Tensor) else torch.from_numpy(np.require(rows, "f4", ["C", "W"]))
    return tensor.to(device, torch.float32)


def lengths(descriptors: Descriptors, name: str, size: int, device: torch.device) -> Floats:
    """Return the L2 norms (N,).

    Raises:
        ValueError: a norm is not finite, or too large for products in fp32.
    """
    found = np.empty(len(descriptors))
    for start, rows in chunks(descriptors, size, device):
        found[start : start + len(rows)] = torch.linalg.vector_norm(rows, dim=1).cpu()
    wrong = np.flatnonzero(~(found < 1e18))
    if len(wrong):
        raise ValueError(
            f"{name} must be finite and shorter than 1e18, got a length of {found[wrong[0]]} in row {wrong[0]}; "
            "check the network"
        )
    return found


def multiplies_in_fp32(device: torch.device) -> bool:
    """Return False if torch is set to round the factors of products in fp32 to TF32 or bf16."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(64, 32, generator=generator).to(device) for _ in range(2))
    found, exact = one @ other.T, one.double() @ other.double().T
    return bool(((found - exact).abs() <= 32 * 2**-24 * exact).all())


def best_first(query: Indices, scores: Floats) -> Indices:
    """Return the order of pairs by query, then by score, the highest first."""
    return np.lexsort((-scores, query))


@dataclass(frozen=True, eq=False)
class Database:
    """Items to be compared with queries, by the dot product of their descriptors as fp32."""

    descriptors: Descriptors
    """Array or tensor (D, C)."""
    longest: float
    """Largest length of a descriptor."""
    device: torch.device
    chunk: int
    """Number of items on the device at a time."""
    screen: bool
    """See `multiplies_in_fp32`."""

    @classmethod
    def of(cls, descriptors: Descriptors, device: torch.device, chunk: int) -> Self:
        """Measure a database. Raises ValueError if a descriptor is not finite or too long."""
        longest = lengths(descriptors, "database", chunk, device).max()
        return cls(descriptors, float(longest), device, chunk, multiplies_in_fp32(device))

    def __len__(self) -> int:
        return len(self.descriptors)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the position of the first item, and descriptors (d, C)."""
        return chunks(self.descriptors, self.chunk, self.device)

    def tie(self, lengths: Floats) -> Floats:
        """Return the largest difference in fp64 between two equal scores of queries of these lengths.

        C u |q||d| bounds the rounding of a dot product in any order of summation (Higham, Accuracy and Stability
        of Numerical Algorithms, section 3.1); it applies to both scores.
        """
        return 2.01 * self.descriptors.shape[1] * 2.0**-53 * self.longest * lengths

    def scores(self, queries: Tensor, places: Places) -> Floats:
        """Compute the scores of M pairs in fp64."""
        found, step = np.empty(len(places.query)), max(1, 2**18 // queries.shape[1])
        for start in range(0, len(found), step):
            query, item = (torch.from_numpy(part[start : start + step]) for part in places)
            chosen = item.to(self.descriptors.device) if isinstance(self.descriptors, Tensor) else item.numpy()
            left, right = queries[query.to(self.device)], _taken(self.descriptors[chosen], self.device)
            if self.device.type == "cpu":  # without a copy in fp64
                found[start : start + step] = np.einsum("pc,pc->p", left.numpy(), right.numpy(), dtype=np.float64)
            else:
                found[start : start + step] = left.double().mul_(right).sum(dim=1).cpu()
        return found

    def block(self, queries: Tensor, first: int, items: Tensor, removed: Places) -> Tensor:
        """Compute the scores (n, d) with a chunk of items in the type of `queries`; pairs in `removed` get -inf."""
        block = queries @ items.to(queries.dtype).T
        inside = (removed.item >= first) & (removed.item < first + len(items))
        place = torch.from_numpy(removed.query[inside]), torch.from_numpy(removed.item[inside] - first)
        block[place[0].to(self.device), place[1].to(self.device)] = -torch.inf
        return block

    def above(self, queries: Chunk, bounds: Bounds, removed: Places) -> Indices:
        """Count the items of its query that score at least as high as each threshold, (M,), without `removed` ones."""
        found = np.zeros(len(bounds.query), np.int64)
        low = bounds._replace(value=bounds.value - self.tie(queries.lengths)[bounds.query])
        for first, items in self.chunks():
            counts = None
            if self.screen:
                counts = self._screened(queries, bounds, low, first, self.block(queries.rows, first, items, removed))
            if counts is None:
                counts = at_least(self.block(queries.rows.double(), first, items, removed), low)
            found += counts
        return found

    def _screened(self, queries: Chunk, bounds: Bounds, low: Bounds, first: int, block: Tensor) -> Indices | None:
        """Count as `above` among some items by their scores in fp32; None if too many are near a threshold."""
        width = 1.01 * queries.rows.shape[1] * 2.0**-24  # of the product of lengths, see `tie`
        width /= 1 - width
        scale = np.maximum(queries.lengths * self.longest, TINY)
        ends = np.searchsorted(bounds.query, np.arange(len(block) + 1))
        asked = np.flatnonzero(np.diff(ends))
        floor = np.full(len(block), np.inf, np.float32)
        lowest = bounds.value[ends[asked + 1] - 1] - width * scale[asked]
        floor[asked] = np.nextafter(lowest.astype(np.float32), np.float32(-np.inf))
        high_enough = block >= torch.from_numpy(floor).to(self.device)[:, None]
        query, item = (index.cpu().numpy() for index in high_enough.nonzero(as_tuple=True))
        # Divided by the largest score, a query's scores lie in [-1, 1]. With 3 between queries, one sort serves all.
        keys = block[high_enough].cpu().numpy() / scale[query] + 3.0 * query
        order = np.argsort(keys)
        keys = keys[order]
        centres = bounds.value / scale[bounds.query] + 3.0 * bounds.query
        near = np.searchsorted(keys, centres - width, side="left")
        sure = np.searchsorted(keys, centres + width, side="right")
        counts = np.searchsorted(query, bounds.query, side="right") - sure
        doubtful = sure - near
        total = int(doubtful.sum())
        if total > NEAR * block.numel():
            return None
        bound = np.repeat(np.arange(len(near)), doubtful)
        candidate = order[np.arange(total) + np.repeat(near - (doubtful.cumsum() - doubtful), doubtful)]
        scores = self.scores(queries.rows, Places(query[candidate], item[candidate] + first))
        return counts + np.bincount(bound[scores >= low.value[bound]], minlength=len(near))


def at_least(block: Tensor, bounds: Bounds) -> Indices:
    """Count the scores (n, d) of its query at least as high as each threshold, (M,), by sorting."""
    found = np.empty(len(bounds.query), np.int64)
    ends = np.searchsorted(bounds.query, np.arange(len(block) + 1))
    for one, row in enumerate(block.cpu().numpy()):
        few = slice(ends[one], ends[one + 1])
        if len(found[few]):
            found[few] = len(row) - np.searchsorted(np.sort(row), bounds.value[few])
    return found

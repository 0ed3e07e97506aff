"""Exact ranks and nearest items by dot product, on any device, in memory that does not grow with the sets."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multigrain.retrieval.metrics import Pairs, Truth, average_precision, per_query
from multigrain.retrieval.scores import (
    Bounds,
    Chunk,
    Database,
    Descriptors,
    Device,
    Indices,
    Places,
    at_least,
    best_first,
    chunks,
    lengths,
)

CHUNK = 2048
"""Number of queries, and of items, whose scores are in memory at a time."""
MANY = 1 / 64
"""Share of positives among all items above which sorting each query's scores costs less than counting."""


def ranks(
    queries: Descriptors, database: Descriptors, truth: Sequence[Truth], device: Device = None, chunk: int = CHUNK
) -> list[Indices]:
    """Return the 0-based ranks of each query's positives, ascending, after its junk is deleted from the list.

    The protocol is that of the revisited Oxford and Paris (arXiv:1803.11285). The rank of a positive is the number of
    negatives with at least its score, plus the positives before it. Ties count against the query, so that a network
    that maps all images to one point finds nothing. Scores are dot products in fp64. Two scores tie if they differ by
    no more than the rounding of fp64 (2C 2^-53 of the product of lengths, 5e-13 for unit vectors of 2,048 channels), so
    that equal descriptors tie on every device and for every chunk.

    Negatives above a positive are counted among products in fp32 without sorting. Scores nearer to the positive than
    the rounding of fp32, C 2^-24 of the product of lengths, are computed again in fp64. If there are many positives,
    each query's scores in fp64 are sorted instead.

    Args:
        queries: tensor or array (Q, C), which may be mapped from a file; taken as fp32.
        database: tensor or array (D, C); brought to the device in chunks.
        truth: right answers to each query.
        device: device that multiplies; by default that of `queries`, or the CPU for an array.
        chunk: side of the blocks of scores. Besides arguments and result, memory is at most
            100 chunk^2 + 16 C chunk bytes and 100 bytes for each positive or junk item of `chunk` queries.
    Raises:
        ValueError: shapes do not fit, a descriptor is not finite or longer than 1e18, or an index is outside the
            database.
    """
    items, parts = _prepared(queries, database, truth, device, chunk)
    many = sum(len(one.positives) for one in truth) > MANY * len(truth) * len(items)
    found: list[Indices] = []
    for part in parts(max(1, min(chunk, chunk**2 // len(items))) if many else chunk):
        positive, removed = _places(truth, part, len(items))
        above = (_sorted if many else _counted)(items, part, positive, removed)
        starts = np.searchsorted(positive.query, np.arange(len(part.rows)))
        # A positive's rank also counts the positives before it.
        found += np.split(above + np.arange(len(above)) - starts[positive.query], starts[1:])
    return found


def _counted(items: Database, part: Chunk, positive: Places, removed: Places) -> Indices:
    """Count the negatives at or above each positive, a query's best positive first."""
    scores = items.scores(part.rows, positive)
    return items.above(part, Bounds(positive.query, scores[best_first(positive.query, scores)]), removed)


def _sorted(items: Database, part: Chunk, positive: Places, removed: Places) -> Indices:
    """Do the same as `_counted` by sorting, for many positives."""
    rows, nothing = part.rows.double(), Places(*np.empty((2, 0), np.int64))
    block = torch.cat([items.block(rows, first, some, nothing) for first, some in items.chunks()], dim=1)
    at = [torch.from_numpy(index).to(items.device) for index in (*positive, *removed)]
    scores = block[at[0], at[1]].cpu().numpy()
    block[at[2], at[3]] = -torch.inf
    scores = scores[best_first(positive.query, scores)] - items.tie(part.lengths)[positive.query]
    return at_least(block, Bounds(positive.query, scores))


def pairs(
    queries: Descriptors, database: Descriptors, truth: Sequence[Truth], device: Device = None, chunk: int = CHUNK
) -> Pairs:
    """Rank all pairs of a query and an item together, for measures such as micro-AP.

    Scores, ties, arguments, memory and errors are those of `ranks`; the result takes 4 Q M bytes for M positive
    pairs. Queries without a positive count by their negatives.
    """
    items, parts = _prepared(queries, database, truth, device, chunk)
    owners, scores, longest = [np.empty(0, np.int64)], [np.empty(0)], 0.0
    for part in parts(chunk):
        positive, _ = _places(truth, part, len(items))
        owners.append(positive.query + part.start)
        scores.append(items.scores(part.rows, positive))
        longest = max(longest, part.lengths.max())
    owner, score = np.concatenate(owners), np.concatenate(scores)
    order = np.argsort(-score)
    bounds = score[order] - items.tie(np.array(longest))
    above = np.zeros((len(truth), len(owner)), np.int32)
    for part in parts(chunk):
        _, removed = _places(truth, part, len(items))
        for first, some in items.chunks():
            block = items.block(part.rows.double(), first, some, removed).cpu().numpy()
            for one, row in enumerate(block, part.start):
                above[one] += (len(row) - np.searchsorted(np.sort(row), bounds)).astype(np.int32)
    return Pairs(owner[order], above)


def top(
    queries: Descriptors, database: Descriptors, k: int, device: Device = None, chunk: int = CHUNK
) -> tuple[Indices, NDArray[np.float32]]:
    """Find the k best items of each query, best first; equal ones in any order.

    Args:
        queries, database, device: as in `ranks`.
        k: at most D.
        chunk: as in `ranks`; memory is at most 40 k chunk bytes more.
    Returns:
        Indices into the database and scores in fp32, (Q, k) each.
    Raises:
        ValueError: as in `ranks`, or k is not in [1, D].
    """
    items, parts = _prepared(queries, database, None, device, chunk)
    if not 1 <= k <= len(items):
        raise ValueError(f"k must lie in [1, {len(items)}], the size of the database, got {k}; set it so")
    indices, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    for part in parts(chunk):
        best, where = part.rows.new_empty(len(part.rows), 0), torch.empty(len(part.rows), 0, dtype=torch.int64)
        where = where.to(best.device)
        for first, some in items.chunks():
            score, place = (part.rows @ some.T).topk(min(k, len(some)))
            best, kept = torch.cat([best, score], dim=1).topk(min(k, best.shape[1] + len(some)))
            where = torch.cat([where, place + first], dim=1).gather(1, kept)
        few = slice(part.start, part.start + len(best))
        indices[few], scores[few] = where.cpu(), best.cpu()
    return indices, scores


def mean_average_precision(
    queries: Descriptors, database: Descriptors, truth: Sequence[Truth], device: Device = None
) -> float:
    """Return the mean of the trapezoidal `average_precision` over the queries with a positive, in [0, 1].

    Arguments and errors are those of `ranks`; a ValueError is also raised if no query has a positive.
    """
    return float(per_query(average_precision)(ranks(queries, database, truth, device)).mean())


def _prepared(
    queries: Descriptors, database: Descriptors, truth: Sequence[Truth] | None, device: Device, chunk: int
) -> tuple[Database, Callable[[int], Iterator[Chunk]]]:
    """Check everything but the truth's indices; return the database, and a function that cuts queries into chunks."""
    shapes = tuple(queries.shape), tuple(database.shape)
    if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][1] or 0 in shapes[1]:
        raise ValueError(
            f"queries (Q, C) and database (D, C) must have the same channels, and an item, got {shapes[0]} and "
            f"{shapes[1]}; take both from one network"
        )
    if truth is not None and len(truth) != len(queries):
        raise ValueError(f"each query needs one truth, got {len(truth)} for {len(queries)} queries")
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}; {CHUNK} suits most machines")
    place = queries.device if device is None and isinstance(queries, Tensor) else torch.device(device or "cpu")
    norms = lengths(queries, "queries", chunk, place)

    def parts(size: int) -> Iterator[Chunk]:
        for start, rows in chunks(queries, size, place):
            yield Chunk(start, rows, norms[start : start + size])

    return Database.of(database, place, chunk), parts


def _places(truth: Sequence[Truth], part: Chunk, size: int) -> tuple[Places, Places]:
    """Return the positives of some queries without junk, and their positives and junk together; sorted, each once."""
    few = truth[part.start : part.start + len(part.rows)]
    keys = []
    for name, lists in (("positives", [one.positives for one in few]), ("junk", [one.junk for one in few])):
        query = np.repeat(np.arange(len(lists)), [len(indices) for indices in lists])
        item = np.concatenate(lists) if len(query) else np.empty(0, np.int64)
        wrong = np.flatnonzero((item < 0) | (item >= size)) if item.dtype.kind in "iu" else np.arange(1)
        if len(wrong):
            raise ValueError(
                f"{name} must be indices into the database of {size}, got {item[wrong[0]]!r} for query "
                f"{part.start + query[wrong[0]]}; check the truth"
            )
        keys.append(np.unique(query * size + item))
    positive = np.setdiff1d(keys[0], keys[1], assume_unique=True)
    return Places(*np.divmod(positive, size)), Places(*np.divmod(np.union1d(keys[0], keys[1]), size))

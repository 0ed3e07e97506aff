"""Pareto fronts of points with several objectives, and an order of the points."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Points = Sequence[Sequence[float]] | NDArray[np.float64]
"""(N, M), finite; larger is better in each of the M objectives."""


def fronts(points: Points) -> NDArray[np.int64]:
    """Front of each point, (N,): 0 if no point dominates it, 1 if only points of front 0 do, and so on.

    A point dominates another if it is nowhere smaller and somewhere larger.
    """
    table = np.atleast_2d(np.asarray(points, dtype=np.float64))
    if table.shape[1] == 1:  # a front for each value
        return np.unique(-table[:, 0], return_inverse=True)[1]
    nowhere_smaller = np.all(table[:, None] >= table[None], axis=2)
    dominates = nowhere_smaller & ~nowhere_smaller.T
    numbers = np.full(len(table), -1)
    front = 0
    while (left := numbers < 0).any():
        numbers[left & ~dominates[left].any(axis=0)] = front
        front += 1
    return numbers


def order(points: Points) -> list[int]:
    """Indices of the points, the best first: by front, and within a front so that its first points cover the front.

    A front begins with its best point by the first objective. Next comes the point that is farthest from all points
    before, with each objective scaled by its range in the front (EpsNet of arXiv:2106.12639). Ties keep their order.
    """
    table = np.atleast_2d(np.asarray(points, dtype=np.float64))
    if table.shape[1] == 1:
        return np.argsort(-table[:, 0], kind="stable").tolist()
    front = fronts(table)
    ordered: list[int] = []
    for number in range(front.max(initial=-1) + 1):
        members = np.flatnonzero(front == number)
        ordered += members[_spread(table[members])].tolist()
    return ordered


def _spread(points: NDArray[np.float64]) -> list[int]:
    extent = np.ptp(points, axis=0)
    scaled = points / np.where(extent > 0, extent, 1)
    chosen = [int(points[:, 0].argmax())]
    distance = np.full(len(points), np.inf)
    distance[chosen] = -1
    while len(chosen) < len(points):
        distance = np.minimum(distance, np.linalg.norm(scaled - scaled[chosen[-1]], axis=1))
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return chosen

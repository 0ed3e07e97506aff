from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grainmill.search.pareto import fronts, order

POINTS = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.tuples(*[st.integers(0, 4)] * width), min_size=1, max_size=12)
)


def dominates(one, other):
    return all(a >= b for a, b in zip(one, other, strict=True)) and one != other


def slow_fronts(points):
    found, left, front = {}, set(range(len(points))), 0
    while left:
        best = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
        found |= dict.fromkeys(best, front)
        left -= best
        front += 1
    return [found[index] for index in range(len(points))]


@given(POINTS)
def test_fronts_are_those_of_taking_away_what_nothing_dominates_again_and_again(points):
    assert fronts(points).tolist() == slow_fronts(points)


@given(POINTS)
def test_order_has_every_point_once_front_after_front(points):
    found = order(points)
    assert sorted(found) == list(range(len(points)))
    front = slow_fronts(points)
    assert all(front[before] <= front[after] for before, after in pairwise(found))


def test_one_objective_is_ordered_by_its_value_and_the_earlier_of_equals_comes_first():
    assert order([[1.0], [3.0], [2.0], [3.0]]) == [1, 3, 2, 0]


def test_a_front_is_ordered_so_that_its_beginning_covers_it():
    # On a line: the best by the first objective, then the far end, the middle, and the quarters.
    line = [(x, 4 - x) for x in (0, 1, 2, 3, 4)]
    assert order(line) == [4, 0, 2, 1, 3]


def test_objectives_count_by_their_range_in_the_front_not_by_their_unit():
    points = [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)]
    assert order([(x, 1000 * y) for x, y in points]) == order(points)


@pytest.mark.parametrize("find", [fronts, order])
def test_no_points_have_no_order(find):
    assert len(find(np.empty((0, 2)))) == 0

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multigrain.retrieval import average_precision, mean_average_precision, positive_ranks

RANKING = [7, 3, 9, 1, 8, 2, 5, 0, 4, 6]
# Item RANKING[r] scores 10 - r.
SCORES = np.array([10.0 - RANKING.index(item) for item in range(10)])


def among(items):
    return np.isin(np.arange(10), items)


def precision_by_loop(scores, positive, junk):
    # The list as the user sees it, negatives first among equals.
    items = sorted((i for i in range(len(scores)) if not junk[i]), key=lambda i: (-scores[i], positive[i]))
    hits, total = 0, 0.0
    for place, item in enumerate(items):
        if positive[item]:
            before = hits / place if place else 1.0
            hits += 1
            total += (before + hits / (place + 1)) / 2
    return total / hits


@pytest.mark.parametrize(("rank", "expected"), [(0, 1), (1, 1 / 4), (2, 1 / 6), (9, 1 / 20)])
def test_one_positive_has_half_the_precision_at_its_rank_unless_first(rank, expected):
    assert average_precision(np.array([rank]), 1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ranks", "positives", "expected"),
    [
        ([0, 1, 2], 3, 1),
        # 1 + (1/2 + 2/3) / 2 + (2/4 + 3/5) / 2
        ([0, 2, 4], 3, 0.711111),
        ([0, 2, 4], 4, 0.533333),
        ([1, 3, 6], 4, 0.261905),
        ([], 2, 0),
    ],
)
def test_average_precision_is_trapezoidal_over_all_positives(ranks, positives, expected):
    assert average_precision(np.array(ranks, dtype=np.int64), positives) == pytest.approx(expected, abs=1e-6)


def test_junk_leaves_the_list_before_ranks_are_counted():
    positive, junk = among([3, 1, 5]), among([7, 8])
    assert positive_ranks(SCORES, positive).tolist() == [1, 3, 6]
    assert positive_ranks(SCORES[~junk], positive[~junk]).tolist() == [0, 2, 4]
    query, database = np.ones((1, 1)), SCORES[:, None]
    assert mean_average_precision(query, database, positive[None], junk[None]) == pytest.approx(0.711111, abs=1e-6)
    # (1/2 + (1/3 + 2/4) + (2/6 + 3/7)) / 6
    assert mean_average_precision(query, database, positive[None]) == pytest.approx(0.349206, abs=1e-6)


def test_a_positive_that_is_junk_is_neither_found_nor_missed():
    query, database = np.ones((1, 1)), SCORES[:, None]
    # 7 comes first, and is junk: 3 then does, and is the only positive left.
    assert mean_average_precision(query, database, among([3, 7])[None], among([7])[None]) == 1


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 30), st.sampled_from([1, 2, 6]))
@settings(deadline=None, max_examples=80)
def test_mean_average_precision_is_that_of_the_walk_down_the_list(seed, queries, items, channels):
    rng = np.random.default_rng(seed)
    # Small whole numbers: scores are exact, and ties frequent.
    query, database = rng.integers(-2, 3, (queries, channels)), rng.integers(-2, 3, (items, channels))
    positive, junk = rng.random((queries, items)) < 0.3, rng.random((queries, items)) < 0.2
    positive[0, 0], junk[0, 0] = True, False
    precisions = [
        precision_by_loop((database @ query[q]).tolist(), positive[q], junk[q])
        for q in range(queries)
        if (positive[q] & ~junk[q]).any()
    ]
    found = mean_average_precision(query.astype(float), database.astype(float), positive, junk)
    assert found == pytest.approx(sum(precisions) / len(precisions))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=20))
@settings(deadline=None, max_examples=50)
def test_ties_go_against_the_query(items):
    scores, positive = np.array([score for score, _ in items]), np.array([hit for _, hit in items], dtype=bool)
    order = sorted(range(len(items)), key=lambda i: (-scores[i], positive[i]))
    expected = [place for place, item in enumerate(order) if positive[item]]
    assert positive_ranks(scores, positive).tolist() == expected


def test_a_network_that_maps_all_images_to_one_point_finds_nothing():
    # Nine others before the only positive: rank 9.
    everywhere = np.tile([0.6, 0.8], (10, 1))
    itself = np.eye(10, dtype=bool)
    assert mean_average_precision(everywhere, everywhere, itself) == pytest.approx(0.05)


def test_equal_descriptors_tie_whatever_their_place_in_a_large_set():
    rng = np.random.default_rng(0)
    for queries, items, channels in [(40, 40, 128), (31, 293, 128), (20, 301, 128), (229, 157, 2048)] * 5:
        descriptor = rng.random(channels, dtype=np.float32)
        descriptor /= np.linalg.norm(descriptor)
        positive = np.arange(items)[None, :] == np.arange(queries)[:, None] % items
        found = mean_average_precision(np.tile(descriptor, (queries, 1)), np.tile(descriptor, (items, 1)), positive)
        assert found == pytest.approx(1 / (2 * items))


def test_a_positive_whose_score_is_not_a_number_comes_last():
    assert positive_ranks(np.array([np.nan, 0.1, 0.2]), np.array([True, False, False])).tolist() == [2]


def test_the_mean_leaves_out_queries_without_a_positive():
    queries, database = np.array([[1.0], [1.0], [-1.0]]), np.array([[2.0], [1.0]])
    positive = np.array([[True, False], [False, False], [True, False]])
    # The first query has 1, the last 1/4.
    assert mean_average_precision(queries, database, positive) == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("positive", "junk"), [(np.zeros((2, 3), dtype=bool), None), (np.ones((2, 3), dtype=bool),) * 2]
)
def test_no_positive_at_all_is_an_error(positive, junk):
    with pytest.raises(ValueError, match="needs a query with a positive"):
        mean_average_precision(np.ones((2, 1)), np.ones((3, 1)), positive, junk)

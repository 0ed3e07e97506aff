"""Ranks and nearest items against sorted lists of exact dot products."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multigrain.retrieval import ranking, scores
from multigrain.retrieval.metrics import Truth, average_precision, micro_ap, same_label
from multigrain.retrieval.ranking import mean_average_precision, pairs, ranks, top

NONE = np.empty(0, np.int64)
BOTH_IN_FP64 = pytest.mark.parametrize("near", [scores.NEAR, 0.0, 1.0], ids=["as it is", "fp64 blocks", "fp64 pairs"])


def rounded(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def only(item, *junk):
    return Truth(np.array([item]), np.array(junk, dtype=np.int64))


def exact(left, right):
    """The dot product of fp32 numbers, whose products fp64 holds, rounded once."""
    return math.fsum((np.asarray(left, dtype="f8") * np.asarray(right, dtype="f8")).tolist())


def walked(query, database, truth):
    """Ranks of the positives on a walk down the list, negatives first among equals."""
    junk = set(truth.junk.tolist())
    positives = set(truth.positives.tolist()) - junk
    items = [(-exact(query, item), number in positives) for number, item in enumerate(database) if number not in junk]
    return [place for place, (_, hit) in enumerate(sorted(items)) if hit]


@st.composite
def problems(draw):
    """Small whole numbers, so that ties are frequent, with few or many positives, and a chunk that cuts them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    queries, items = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    channels, most = draw(st.sampled_from([1, 2, 6])), draw(st.sampled_from([1, 2, 20]))
    truth = [
        Truth(rng.integers(items, size=rng.integers(0, most + 1)), rng.integers(items, size=3)) for _ in range(queries)
    ]
    query, database = rng.integers(-2, 3, (queries, channels)), rng.integers(-2, 3, (items, channels))
    return query.astype("f4"), database.astype("f4"), truth, draw(st.sampled_from([1, 3, 7, 100]))


@pytest.fixture(params=["counted", "sorted", "by the share"])
def way(request, monkeypatch):
    """Both ways to ranks, whatever the share of positives."""
    monkeypatch.setattr(ranking, "MANY", {"counted": 2, "sorted": -1}.get(request.param, ranking.MANY))


def each_way(monkeypatch_context, function):
    for many in (2, -1):
        with monkeypatch_context() as patch:
            patch.setattr(ranking, "MANY", many)
            yield function()


@given(problems())
@settings(deadline=None, max_examples=80)
def test_ranks_are_those_of_the_walk_down_the_list(problem):
    queries, database, truth, chunk = problem
    expected = [walked(query, database, one) for query, one in zip(queries, truth, strict=True)]
    for found in each_way(pytest.MonkeyPatch.context, lambda: ranks(queries, database, truth, chunk=chunk)):
        assert [one.tolist() for one in found] == expected
        assert all(one.dtype == np.int64 for one in found)


def test_junk_leaves_the_list_before_ranks_are_counted(way):
    order = [7, 3, 9, 1, 8, 2, 5, 0, 4, 6]
    database = np.array([[10.0 - order.index(item)] for item in range(10)])
    for junk, expected in (([7, 8], [0, 2, 4]), ([], [1, 3, 6])):
        truth = [Truth(np.array([3, 1, 5]), np.array(junk, dtype=np.int64))]
        assert [found.tolist() for found in ranks(np.ones((1, 1)), database, truth)] == [expected]


@cache
def close_scores(channels):
    """A query, a positive, and negatives that differ from it by the last bits of a few channels, or not at all."""
    rng = np.random.default_rng(channels)
    query, positive = unit(rounded(2, channels, seed=channels))
    database = np.tile(positive, (300, 1))
    for row in database[50:]:
        few = rng.integers(channels, size=3)
        row[few] = np.nextafter(row[few], rng.choice([-1, 1], 3).astype("f4"))
    database = np.concatenate([database, unit(rounded(600, channels, seed=1))])
    return query[None], database, [exact(query, item) for item in database]


@pytest.mark.parametrize("channels", [33, 512])
@BOTH_IN_FP64
def test_scores_that_fp32_cannot_tell_apart_are_ranked_exactly(way, near, channels, monkeypatch):
    monkeypatch.setattr(scores, "NEAR", near)
    queries, database, products = close_scores(channels)
    expected = [sum(score >= products[0] for score in products[1:])]
    in_fp32 = database @ queries[0]
    assert (in_fp32[1:] >= in_fp32[0]).sum() != expected[0]
    for chunk in (100, 999, 4000):
        assert ranks(queries, database, [only(0)], chunk=chunk)[0].tolist() == expected


def test_equal_descriptors_tie_wherever_they_stand(way):
    for queries, items, channels in [(40, 40, 128), (31, 293, 128), (229, 157, 512), (3, 2500, 64)]:
        descriptor = unit(rounded(1, channels, seed=items))
        truth = [only(query % items) for query in range(queries)]
        found = ranks(np.tile(descriptor, (queries, 1)), np.tile(descriptor, (items, 1)), truth, chunk=190)
        assert [one.tolist() for one in found] == [[items - 1]] * queries


def test_a_network_that_maps_all_images_to_one_point_finds_nothing():
    # Nine others before the only positive: rank 9.
    everywhere = np.tile([0.6, 0.8], (10, 1))
    assert mean_average_precision(everywhere, everywhere, [only(item) for item in range(10)]) == pytest.approx(0.05)


@BOTH_IN_FP64
def test_scores_that_fp64_may_have_put_apart_tie(way, near, monkeypatch):
    # 1 + 2^-52, 1 and 1 - 2^-49. By the lengths, 1 and sqrt(2), 2 * 3 * 2^-53 * sqrt(2) = 4.2 * 2^-52 may be rounding.
    monkeypatch.setattr(scores, "NEAR", near)
    queries, database = np.array([[1, 2**-52, 2**-49]]), np.array([[1, 1, 0], [1, 0, 0], [1, 0, -1]])
    assert ranks(queries, database, [only(0)])[0].tolist() == [1]


@BOTH_IN_FP64
def test_descriptors_of_zeros_tie(way, near, monkeypatch):
    monkeypatch.setattr(scores, "NEAR", near)
    for queries, database in ((np.zeros((1, 3)), np.eye(3)), (np.ones((1, 3)), np.zeros((3, 3)))):
        assert ranks(queries, database, [only(1)])[0].tolist() == [2]


def test_ranks_do_not_depend_on_the_length_of_queries(way):
    queries, database = unit(rounded(6, 40)), unit(rounded(900, 40, seed=1))
    truth = [Truth(np.arange(query, 30, 6), np.array([40])) for query in range(6)]
    lengths = np.array([1e-18, 1e-9, 1, 1e3, 1e9, 1e17], dtype=np.float32)
    # The power of two nearest to each: nothing is rounded.
    powers = np.exp2(np.round(np.log2(lengths)))[:, None].astype("f4")
    expected = [walked(query, database, one) for query, one in zip(queries, truth, strict=True)]
    assert [one.tolist() for one in ranks(queries * powers, database, truth)] == expected
    assert [one.tolist() for one in ranks(queries, database * powers[0] ** 2, truth)] == expected


def test_products_that_torch_rounds_further_are_made_in_fp64(monkeypatch):
    assert scores.multiplies_in_fp32(torch.device("cpu"))
    queries, database = unit(rounded(5, 60)), unit(rounded(800, 60, seed=1))
    truth = [only(query) for query in range(5)]
    expected = [walked(query, database, one) for query, one in zip(queries, truth, strict=True)]
    multiply = torch.Tensor.__matmul__

    def coarse(left, right):
        # Eight bits of each number, as in bf16.
        both = (x.bfloat16().float() if x.dtype == torch.float32 else x for x in (left, right))
        return multiply(*both)

    monkeypatch.setattr(torch.Tensor, "__matmul__", coarse)
    assert not scores.multiplies_in_fp32(torch.device("cpu"))
    assert [one.tolist() for one in ranks(queries, database, truth)] == expected


def test_arrays_and_tensors_of_every_type_are_taken_as_fp32(tmp_path):
    queries, database = rounded(4, 8), rounded(50, 8, seed=1)
    truth = [only(query) for query in range(4)]
    expected = [one.tolist() for one in ranks(queries, database, truth)]
    np.save(tmp_path / "database.npy", database)
    mapped = np.load(tmp_path / "database.npy", mmap_mode="r")
    tensor = torch.from_numpy(database).requires_grad_()
    for given_database in (mapped, tensor, database.astype("f8"), np.asfortranarray(database)):
        for given_queries in (queries, torch.from_numpy(queries), queries[:, ::-1].copy()[:, ::-1]):
            found = ranks(given_queries, given_database, truth, chunk=7)
            assert [one.tolist() for one in found] == expected


def test_no_query_has_no_ranks():
    assert ranks(np.empty((0, 2)), np.ones((3, 2)), []) == []


def test_queries_without_a_positive_have_no_ranks_and_are_left_out_of_the_mean(way):
    queries, database = np.array([[1.0], [1.0], [-1.0]]), np.array([[2.0], [1.0]])
    truth = [only(0), Truth(NONE, NONE), only(0)]
    assert [one.tolist() for one in ranks(queries, database, truth)] == [[0], [], [1]]
    # The first query has 1, the last 1/4.
    assert mean_average_precision(queries, database, truth) == pytest.approx(0.625)
    with pytest.raises(ValueError, match="needs a query with a positive"):
        mean_average_precision(queries[:2], database, [Truth(NONE, NONE), only(1, 1)])


def test_mean_average_precision_of_items_among_each_other():
    labels = np.arange(60) % 7
    descriptors = unit(rounded(60, 5))
    truth = same_label(labels)
    each = [
        average_precision(np.array(walked(*one))) for one in zip(descriptors, [descriptors] * 60, truth, strict=True)
    ]
    assert mean_average_precision(descriptors, descriptors, truth) == pytest.approx(sum(each) / 60)


@given(problems())
@settings(deadline=None, max_examples=60)
def test_pairs_are_those_of_all_scores(problem):
    queries, database, truth, chunk = problem
    found = pairs(queries, database, truth, chunk=chunk)
    products = queries.astype(int) @ database.astype(int).T
    junk = [set(one.junk.tolist()) for one in truth]
    positives = [set(one.positives.tolist()) - taken for one, taken in zip(truth, junk, strict=True)]
    owned = sorted((-products[q, i], q) for q in range(len(queries)) for i in positives[q])
    negatives = [
        [products[q, i] for i in range(len(database)) if i not in positives[q] | junk[q]] for q in range(len(queries))
    ]
    # Equal pairs stand in any order.
    assert sorted(found.owner.tolist()) == sorted(q for _, q in owned)
    assert found.above.shape == (len(queries), len(owned))
    for q in range(len(queries)):
        assert found.above[q].tolist() == [sum(score >= -value for score in negatives[q]) for value, _ in owned]
    for place, owner in enumerate(found.owner):
        value = owned[place][0]
        assert (value, owner) in owned


def test_pairs_of_equal_descriptors_tie_between_queries():
    for channels in range(100, 400, 30):
        descriptor = unit(rounded(1, channels, seed=channels))
        found = pairs(np.tile(descriptor, (9, 1)), np.tile(descriptor, (40, 1)), [only(q) for q in range(9)], chunk=4)
        assert (found.above == 39).all()
    # Before the n-th positive stand all 9 * 39 negatives.
    assert micro_ap(found) == pytest.approx(np.mean([n / (n + 9 * 39) for n in range(1, 10)]))


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 30), st.sampled_from([1, 4, 50]), st.data())
@settings(deadline=None, max_examples=40)
def test_top_items_are_those_of_the_sorted_list(seed, queries, items, chunk, data):
    rng = np.random.default_rng(seed)
    query, database = rng.integers(-3, 4, (queries, 4)), rng.integers(-3, 4, (items, 4))
    k = data.draw(st.integers(1, items))
    indices, found = top(query.astype("f4"), database.astype("f4"), k, chunk=chunk)
    products = query @ database.T
    assert indices.shape == found.shape == (queries, k)
    assert indices.dtype == np.int64
    assert found.dtype == np.float32
    assert (found == -np.sort(-products, axis=1)[:, :k]).all()
    assert (np.take_along_axis(products, indices, axis=1) == found).all()
    assert all(len(set(row)) == k for row in indices.tolist())


def spoilt(value):
    database = np.ones((50, 2))
    database[41, 1] = value
    return database


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 1e19])
def test_a_descriptor_that_is_not_finite_is_an_error(value):
    with np.errstate(over="ignore"):
        for call in (ranks, pairs):
            with pytest.raises(ValueError, match=r"database must be finite .* in row 41; check the network"):
                call(np.ones((1, 2)), spoilt(value), [only(0)], chunk=20)
        with pytest.raises(ValueError, match=r"queries must be finite .* in row 41"):
            top(spoilt(value), np.ones((3, 2)), 1, chunk=20)


@pytest.mark.parametrize(
    ("queries", "database"), [((2, 3), (4, 2)), ((3,), (4, 3)), ((2, 3), (3,)), ((2, 3), (0, 3)), ((2, 0), (4, 0))]
)
def test_shapes_that_do_not_fit_are_an_error(queries, database):
    with pytest.raises(
        ValueError, match=r"must have the same channels, and an item, got .* take both from one network"
    ):
        ranks(np.ones(queries), np.ones(database), [only(0)] * 2)


@pytest.mark.parametrize("wrong", [5, -1])
@pytest.mark.parametrize("name", ["positives", "junk"])
def test_an_index_outside_the_database_is_an_error(name, wrong):
    truth = [only(0)] * 3 + [only(0, 1)._replace(**{name: np.array([2, wrong])})]
    with pytest.raises(ValueError, match=rf"{name} must be indices .* of 5, got .*{wrong}.* for query 3"):
        ranks(np.ones((4, 2)), np.ones((5, 2)), truth, chunk=2)


def test_masks_are_not_indices():
    with pytest.raises(ValueError, match="positives must be indices"):
        ranks(np.ones((1, 2)), np.ones((5, 2)), [Truth(np.array([True, False, True]), NONE)])


def test_one_truth_a_query_a_chunk_and_a_k_in_range_are_asked_for():
    queries, database = np.ones((2, 2)), np.ones((5, 2))
    with pytest.raises(ValueError, match="each query needs one truth, got 1 for 2 queries"):
        ranks(queries, database, [only(0)])
    with pytest.raises(ValueError, match="chunk must be 1 or more, got 0; 2048 suits"):
        ranks(queries, database, [only(0)] * 2, chunk=0)
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"k must lie in \[1, 5\], the size of the database, got {k}"):
            top(queries, database, k)

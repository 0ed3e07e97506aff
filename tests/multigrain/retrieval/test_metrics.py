"""Measures against figures worked out by hand, walks down the list, and scikit-learn."""

import math
from statistics import NormalDist, fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from multigrain.retrieval import metrics
from multigrain.retrieval.metrics import (
    MEASURES,
    Pairs,
    average_precision,
    average_precision_at_r,
    average_precision_finite,
    interval,
    micro_ap,
    precision_at,
    recall_at_p90,
    same_label,
)

some_ranks = st.sets(st.integers(0, 60), min_size=1, max_size=12).map(sorted)


def ints(values):
    return np.array(values, dtype=np.int64)


def trapezoid_by_curve(ranks, positives):
    """Area under the precision-recall curve, walked item by item: precision 1 before the first one."""
    hits, area, precision, recall = 0, 0.0, 1.0, 0.0
    for place in range(max(ranks) + 1):
        hits += place in ranks
        new_precision, new_recall = hits / (place + 1), hits / positives
        area += (new_recall - recall) * (precision + new_precision) / 2
        precision, recall = new_precision, new_recall
    return area


def as_list(ranks, length=80):
    """(is positive, score) of a list in which the positives stand at these ranks."""
    return [place in ranks for place in range(length)], [-place for place in range(length)]


@pytest.mark.parametrize(("rank", "expected"), [(0, 1), (1, 1 / 4), (2, 1 / 6), (9, 1 / 20)])
def test_one_positive_has_half_the_precision_at_its_rank_unless_first(rank, expected):
    assert average_precision(ints([rank])) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ranks", "positives", "trapezoid", "finite"),
    [
        ([0, 1, 2], 3, 1, 1),
        # 1 + (1/2 + 2/3) / 2 + (2/4 + 3/5) / 2; 1 + 2/3 + 3/5
        ([0, 2, 4], 3, 0.711111, 0.755556),
        ([0, 2, 4], 4, 0.533333, 0.566667),
        # 2/4 as the first positive is at 1
        ([1, 3, 6], 4, 0.261905, (1 / 2 + 2 / 4 + 3 / 7) / 4),
        ([], 2, 0, 0),
    ],
)
def test_average_precisions_of_the_worked_cases(ranks, positives, trapezoid, finite):
    assert average_precision(ints(ranks), positives) == pytest.approx(trapezoid, abs=1e-6)
    assert average_precision_finite(ints(ranks), positives) == pytest.approx(finite, abs=1e-6)


@given(some_ranks, st.integers(0, 3))
@settings(deadline=None)
def test_average_precision_is_the_area_under_the_curve(ranks, missed):
    positives = len(ranks) + missed
    assert average_precision(ints(ranks), positives) == pytest.approx(trapezoid_by_curve(ranks, positives))
    if not missed:
        assert average_precision(ints(ranks)) == average_precision(ints(ranks), positives)


@given(some_ranks)
@settings(deadline=None)
def test_finite_average_precision_is_that_of_scikit_learn(ranks):
    assert average_precision_finite(ints(ranks)) == pytest.approx(average_precision_score(*as_list(ranks)))


@given(some_ranks)
@settings(deadline=None)
def test_average_precision_at_r_stops_after_as_many_items_as_positives(ranks):
    positive, _ = as_list(ranks)
    total = len(ranks)
    expected = sum(sum(positive[: i + 1]) / (i + 1) for i in range(total) if positive[i]) / total
    assert average_precision_at_r(ints(ranks)) == pytest.approx(expected)


def test_precision_at_k_of_the_worked_case():
    assert [precision_at(k)(ints([0, 2, 4])) for k in (1, 5, 10)] == pytest.approx([1, 0.6, 0.6])


@given(some_ranks, st.integers(1, 20))
@settings(deadline=None)
def test_precision_at_k_looks_no_further_than_the_last_positive(ranks, k):
    positive, _ = as_list(ranks)
    while positive and not positive[-1]:
        positive.pop()
    assert precision_at(k)(ints(ranks)) == pytest.approx(fmean(positive[:k]))


@given(st.lists(some_ranks, min_size=1, max_size=6), st.sampled_from([1, 2, 4, 8, 10]))
@settings(deadline=None)
def test_recall_at_k_is_the_share_of_queries_that_find_something(lists, k):
    found = [any(as_list(ranks)[0][:k]) for ranks in lists]
    assert MEASURES[f"recall@{k}"].values([ints(ranks) for ranks in lists]).tolist() == found


def test_ukb_score_of_the_worked_case():
    # Own-object images among the first four, the query itself at 0.
    lists = [
        [0, 1, 2, 3],
        [0, 1, 3, 9],
        [0, 2, 3, 4],
        [0, 4, 5, 6],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 7],
        [0, 8, 9, 9],
    ]
    assert MEASURES["ukb"].values([ints(ranks) for ranks in lists]).tolist() == [4, 3, 3, 1, 4, 4, 3, 1]
    assert MEASURES["ukb"].values([ints(ranks) for ranks in lists]).mean() == 2.875


@pytest.mark.parametrize("name", [name for name, measure in MEASURES.items() if measure.source == "ranks"])
def test_a_mean_leaves_out_queries_without_a_positive(name):
    nothing, values = ints([]), MEASURES[name].values
    assert values([ints([0]), nothing, ints([3])]).tolist() == values([ints([0]), ints([3])]).tolist()
    with pytest.raises(ValueError, match="needs a query with a positive, got none among 2; check"):
        values([nothing, nothing])


def pairs_of(scores, positive, junk):
    """`Pairs` by comparing every score with every positive's."""
    owner = [(q, i) for q, i in zip(*np.nonzero(positive & ~junk), strict=True)]
    owner.sort(key=lambda pair: -scores[pair])
    negative = ~positive & ~junk
    above = [[sum(negative[q] & (scores[q] >= scores[pair])) for pair in owner] for q in range(len(scores))]
    return Pairs(ints([q for q, _ in owner]), np.array(above, dtype=np.int32).reshape(len(scores), len(owner)))


def as_one_list(scores, positive, junk):
    """Whether each pair of the global ranking is positive, best first, negatives first among equals."""
    everything = [(-scores[at], positive[at]) for at in np.ndindex(scores.shape) if not junk[at]]
    return [hit for _, hit in sorted(everything)]


def recall_by_walk(hits, least):
    best = found = 0
    for place, hit in enumerate(hits):
        found += hit
        if found / (place + 1) >= least:
            best = found
    return best / sum(hits)


@st.composite
def global_rankings(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 20)))
    # Few values: ties are frequent, between queries too. Positives score higher.
    positive, junk = rng.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.9])), rng.random(shape) < 0.2
    positive[0, 0], junk[0, 0] = True, False
    return (
        rng.integers(0, draw(st.sampled_from([3, 30])), shape) + 5 * positive * (rng.random(shape) < 0.7),
        positive,
        junk,
    )


@given(global_rankings())
@settings(deadline=None)
def test_micro_measures_are_those_of_the_one_list_of_all_pairs(ranking):
    hits, pairs = as_one_list(*ranking), pairs_of(*ranking)
    # Scikit-learn takes equal scores together; the list has none.
    assert micro_ap(pairs) == pytest.approx(average_precision_score(hits, -np.arange(len(hits))))
    assert recall_at_p90(pairs) == pytest.approx(recall_by_walk(hits, 0.9))


def test_micro_ap_counts_what_queries_without_a_positive_find():
    # One list: wrong (query 1), right, right; each query alone is perfect or has nothing to find.
    pairs = Pairs(ints([0, 0]), np.array([[0, 0], [1, 1]], dtype=np.int32))
    assert micro_ap(pairs) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert recall_at_p90(pairs) == 0
    with pytest.raises(ValueError, match="needs a positive one"):
        micro_ap(Pairs(ints([]), np.zeros((2, 0), dtype=np.int32)))


@given(global_rankings(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_micro_measures_of_a_sample_are_those_of_its_queries(ranking, seed):
    rng = np.random.default_rng(seed)
    queries = len(ranking[0])
    chosen = rng.permutation(queries)[: rng.integers(1, queries + 1)]
    times = np.stack([np.isin(np.arange(queries), chosen), np.ones(queries, dtype=bool)]).astype(int)
    whole, part = pairs_of(*ranking), tuple(array[chosen] for array in ranking)
    for measure in (micro_ap, recall_at_p90):
        of_part, of_whole = measure(whole, times)
        assert of_whole == pytest.approx(measure(whole)[0])
        if (part[1] & ~part[2]).any():
            assert of_part == pytest.approx(measure(pairs_of(*part))[0])
        else:
            assert math.isnan(of_part)


@pytest.mark.parametrize("measure", [micro_ap, recall_at_p90])
@pytest.mark.parametrize("block", [1, 40, 90])
def test_many_pairs_are_taken_in_parts(monkeypatch, measure, block):
    rng = np.random.default_rng(0)
    positive = rng.random((12, 60)) < 0.1
    pairs = pairs_of(rng.random(positive.shape) + 0.6 * positive, positive, np.zeros_like(positive))
    times = rng.integers(0, 3, (20, 12))
    whole = measure(pairs, times)
    assert len(np.unique(whole)) > 5
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert measure(pairs, times) == pytest.approx(whole, rel=1e-6)


def test_wrong_pairs_are_counted_exactly_however_many():
    pairs = Pairs(ints([0]), np.array([[2**24 + 1]], dtype=np.int32))
    assert micro_ap(pairs) == 1 / (2**24 + 2)
    # Three times 2^22 + 1 is exact in fp32, five times is not.
    few = Pairs(ints([0]), np.array([[2**22 + 1]], dtype=np.int32))
    for times in ([[3], [1]], [[5], [1]]):
        assert micro_ap(few, np.array(times)) == pytest.approx([1 / (2**22 + 2)] * 2, rel=1e-7)


def test_a_query_drawn_twice_counts_twice():
    # Scores: 0 has a positive at 9, 1 has a negative at 8 and a positive at 7.
    pairs = Pairs(ints([0, 1]), np.array([[0, 0], [0, 1]], dtype=np.int32))
    # right right wrong right; right wrong wrong, then two right at once: 3 / 5.
    expected = [(1 + 1 + 3 / 4) / 3, (1 + 3 / 5 + 3 / 5) / 3]
    assert micro_ap(pairs, np.array([[2, 1], [1, 2]])) == pytest.approx(expected)
    assert recall_at_p90(pairs, np.array([[2, 1], [1, 2]])) == pytest.approx([2 / 3, 1 / 3])


def test_a_sample_without_a_positive_pair_has_no_value_and_is_left_out_of_the_interval():
    # Only query 0 has a positive; what query 1 finds stands before it. Drawn: 1 twice, each once, 0 twice.
    pairs = Pairs(ints([0]), np.array([[0], [1]], dtype=np.int32))
    assert micro_ap(pairs, np.array([[0, 2], [1, 1], [2, 0]])) == pytest.approx([math.nan, 1 / 2, 1], nan_ok=True)
    assert recall_at_p90(pairs, np.array([[0, 2], [1, 1], [2, 0]])) == pytest.approx([math.nan, 0, 1], nan_ok=True)
    assert interval(pairs) == pytest.approx((1 / 2, 1))


@pytest.mark.parametrize(("name", "k"), [("top1", 1), ("top5", 5)])
def test_top_k_is_the_share_of_images_whose_class_is_among_the_first(name, k):
    rng = np.random.default_rng(k)
    logits, labels = rng.permuted(np.tile(np.arange(9.0), (40, 1)), axis=1), rng.integers(0, 9, 40)
    expected = [label in sorted(range(9), key=lambda c: -row[c])[:k] for row, label in zip(logits, labels, strict=True)]
    assert MEASURES[name].values(logits, labels).tolist() == expected
    assert 0 < fmean(expected) < 1


def test_ties_and_nans_go_against_the_classifier():
    logits = np.array([[1.0, 1.0], [1.0, math.nan], [math.nan, 1.0], [math.nan, math.nan], [2.0, 1.0]])
    assert MEASURES["top1"].values(logits, np.zeros(5, dtype=int)).tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("labels", [[3, 1, 3, 3, 1, 7], ["b", "a", "b", "b", "a", "c"]])
def test_items_of_one_label_are_positives_of_each_other(labels):
    for item, (positives, junk) in enumerate(same_label(np.array(labels))):
        assert positives.tolist() == [other for other in range(6) if labels[other] == labels[item]]
        assert junk.tolist() == [item]


def test_the_interval_of_a_mean_is_that_of_its_normal_distribution():
    rng = np.random.default_rng(0)
    values = rng.random(4000)
    error = values.std() / math.sqrt(4000)
    for level in (0.8, 0.95):
        half = NormalDist().inv_cdf((1 + level) / 2) * error
        low, high = interval(values, draws=4000, level=level)
        assert low == pytest.approx(values.mean() - half, abs=0.1 * error)
        assert high == pytest.approx(values.mean() + half, abs=0.1 * error)


def test_intervals_repeat_with_their_seed():
    values = np.random.default_rng(0).random(50)
    assert interval(values, seed=3) == interval(values, seed=3) != interval(values, seed=4)
    assert interval(np.full(7, 0.25)) == (0.25, 0.25)
    # So many that the draws are made in parts.
    many = np.random.default_rng(1).random(30_000)
    low, high = interval(many, draws=300)
    assert low < many.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * many.std() / math.sqrt(30_000), rel=0.25)


@pytest.mark.parametrize("measure", [micro_ap, recall_at_p90])
def test_the_interval_of_a_micro_measure_draws_queries(measure):
    rng = np.random.default_rng(0)
    positive = np.eye(12, 16, dtype=bool)
    scores = rng.random(positive.shape) + 0.6 * positive
    pairs = pairs_of(scores, positive, np.zeros_like(positive))
    found = []
    for _ in range(400):
        chosen = rng.integers(12, size=12)
        found.append(measure(pairs_of(scores[chosen], positive[chosen], np.zeros_like(positive)))[0])
    low, high = interval(pairs, measure=measure)
    assert [low, high] == pytest.approx(np.quantile(found, [0.025, 0.975]), abs=0.08)
    assert low < measure(pairs)[0] < high


def test_an_interval_of_pairs_draws_as_often_as_asked_each_time_anew():
    queries, pairs = 8, Pairs(ints([0]), np.zeros((8, 1), dtype=np.int32))
    drawn = []
    interval(pairs, draws=100, measure=lambda _, times: drawn.append(times) or np.zeros(len(times)))
    (times,) = drawn
    assert times.shape == (100, queries)
    assert (times.sum(axis=1) == queries).all()
    assert len(np.unique(times, axis=0)) > 90
    assert np.abs(times.mean(axis=0) - 1).max() < 0.4  # four times the deviation of 100 draws


@pytest.mark.parametrize(
    ("values", "changes"),
    [(np.empty(0), {}), (np.ones(3), {"draws": 0}), (np.ones(3), {"level": 1.0}), (np.ones(3), {"level": 0.0})],
)
def test_what_an_interval_cannot_be_made_of_is_an_error(values, changes):
    with pytest.raises(ValueError, match=r"needs a query, a draw and a level in \(0, 1\)"):
        interval(values, **changes)


def test_every_measure_is_described_and_takes_what_it_says():
    # What the benchmarks of the literature report.
    assert {*(f"recall@{k}" for k in (1, 2, 4, 8, 10, 100, 1000)), "mp@1", "mp@5", "mp@10"} <= MEASURES.keys()
    ranks, pairs = [ints([0, 2])], Pairs(ints([0]), np.zeros((1, 1), dtype=np.int32))
    given = {"ranks": (ranks,), "pairs": (pairs,), "logits": (np.eye(3), np.arange(3))}
    for name, measure in MEASURES.items():
        assert 0 < measure.values(*given[measure.source]).mean() <= (4 if name == "ukb" else 1)
        assert measure.description

"""Exact search, compared with loops over all pairs."""

import numpy as np
import pytest

from grainmill.corpus import nearest


def unit(count, channels, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, channels)).astype("f4")
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def in_blocks(rows, size):
    """Return a function that yields the rows in blocks, as `Index.blocks` does."""

    def blocks(start=0):
        return ((at, rows[at : at + size]) for at in range(0, len(rows), size) if at + size > start)

    return blocks


@pytest.mark.parametrize("size", [1, 7, 50, 200])
@pytest.mark.parametrize("k", [1, 5, 50, 80])
def test_the_nearest_rows_are_those_of_a_loop_over_all(size, k):
    rows, queries = unit(50, 8), unit(3, 8, seed=1)
    places, scores = nearest.top_k(queries, in_blocks(rows, size)(), k)
    assert places.shape == scores.shape == (3, min(k, 50))
    for query, found, told in zip(queries, places, scores, strict=True):
        expected = sorted(((float(query @ row), place) for place, row in enumerate(rows)), reverse=True)[:k]
        assert found.tolist() == [place for _, place in expected]
        assert told == pytest.approx([score for score, _ in expected], abs=1e-6)


@pytest.mark.parametrize("size", [1, 7, 30, 100])
@pytest.mark.parametrize("outer", [1, 10, 64])
def test_all_pairs_above_a_score_are_found_once(monkeypatch, size, outer):
    monkeypatch.setattr(nearest, "OUTER", outer)
    rows = unit(40, 3)
    found = nearest.pairs(in_blocks(rows, size), 0.5, 10_000)
    expected = {(a, b): float(rows[a] @ rows[b]) for a in range(40) for b in range(a + 1, 40)}
    expected = {pair: score for pair, score in expected.items() if score >= 0.5}
    got = dict(zip(zip(found.first.tolist(), found.second.tolist(), strict=True), found.score.tolist(), strict=True))
    assert len(got) == len(found.score)
    assert not found.more
    assert got == pytest.approx(expected, abs=1e-6)
    assert found.score.tolist() == sorted(found.score.tolist(), reverse=True)


def test_of_too_many_pairs_the_best_are_kept():
    rows = unit(60, 3)
    whole, some = (nearest.pairs(in_blocks(rows, 8), -1, most) for most in (10_000, 25))
    assert some.more
    assert not whole.more
    assert len(whole.score) == 60 * 59 / 2
    assert some.score == pytest.approx(whole.score[:25])


def test_the_score_that_is_asked_for_is_among_those_listed():
    rows = np.array([[1, 0], [0.6, 0.8], [0, 1]], "f4")  # products 0.6, 0, 0.8
    found = nearest.pairs(in_blocks(rows, 2), float(np.float32(0.6)), 10)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == [(1, 2), (0, 1)]

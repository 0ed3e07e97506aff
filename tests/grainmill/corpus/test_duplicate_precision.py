"""Estimate of the precision, on corpora with known copies."""

import numpy as np
import pytest

from grainmill.corpus import duplicate_precision, nearest

MOST = 20_000


def corpus(kind, share, noise, seed, images=1500, channels=64):
    """Return random rows, alone or in families, the last of them copies, and the index of each row's original."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(images, channels))
    if kind == "families":
        rows = rng.normal(size=(20, channels))[rng.integers(0, 20, images)] + 0.5 * rows
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    originals = rng.choice(images, round(share * images), replace=False)
    made = rows[originals] + noise * rng.normal(size=(len(originals), channels)) / np.sqrt(channels)
    rows = np.concatenate([rows, made])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("f4"), originals


def listed(rows, precision):
    """Return the pairs down to the stated precision, as `query.duplicates` lists them."""

    def blocks(start):
        return [(at, rows[at : at + 512]) for at in range(0, len(rows), 512) if at + 512 > start]

    scores = rows @ rows.T
    np.fill_diagonal(scores, -2)
    tails = duplicate_precision.fit_null_model(
        -np.sort(-scores, axis=1)[:, : duplicate_precision.NEIGHBOURS], len(rows)
    )
    found = nearest.pairs(blocks, tails.score_of((1 - precision) * MOST), MOST)
    kept = int((duplicate_precision.precision(found.score, tails) >= precision).sum())
    return list(zip(found.first[:kept].tolist(), found.second[:kept].tolist(), strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["alone", "families"])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_the_stated_precision_is_kept_and_copies_are_found(kind, share, seed):
    rows, originals = corpus(kind, share, 0.15, seed)
    pairs = listed(rows, 0.9)
    right = {(original, 1500 + number) for number, original in enumerate(originals.tolist())}
    assert len(right & set(pairs)) >= 0.9 * len(pairs)
    assert len(right & set(pairs)) >= 0.9 * len(right)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["alone", "families"])
def test_where_there_are_no_copies_next_to_nothing_is_listed(kind, seed):
    rows, _ = corpus(kind, 0, 0, seed)
    assert len(listed(rows, 0.9)) <= 2


def test_the_expected_number_of_false_pairs_grows_as_a_power_of_the_distance():
    # Six neighbours within the distance of score 0.8 and 0.9; 1 - score is half of the squared distance.
    tails = duplicate_precision.NullModel(
        duplicate_precision.depth(np.array([0.8, 0.9])), np.array([2 / 10, 2 / 4]), 1000
    )
    halved = 1 - 0.2 / 4, 1 - 0.1 / 4  # the scores at half of these distances
    first = np.mean([6 * 0.5**10, 6 * (0.05 / 0.1) ** 2]) * 1000 / 2
    second = np.mean([6 * (0.025 / 0.2) ** 5, 6 * 0.5**4]) * 1000 / 2
    assert tails.false_pairs(np.array(halved)) == pytest.approx([first, second], rel=1e-6)
    floor = tails.score_of(50)
    assert tails.false_pairs(np.array([floor]))[0] <= 50 < tails.false_pairs(np.array([1 - (1 - floor) * 1.02]))[0]


def test_precision_falls_down_the_list_and_equal_scores_share_it():
    tails = duplicate_precision.NullModel(duplicate_precision.depth(np.array([0.5])), np.array([2 / 10]), 100)
    scores = np.array([1.0, 0.95, 0.95, 0.9, 0.8, 0.7], "f4")
    found = duplicate_precision.precision(scores, tails)
    assert found[1] == found[2]
    assert (np.diff(found) <= 0).all()
    false = 6 * (0.1 / 0.5) ** 5 * 100 / 2
    assert found[3] == pytest.approx(1 - false / 4, abs=1e-3)
    assert found[-1] == 0


def test_an_empty_list_has_no_precision():
    assert (
        len(
            duplicate_precision.precision(
                np.empty(0, "f4"), duplicate_precision.NullModel(np.array([0.5]), np.array([0.1]), 9)
            )
        )
        == 0
    )


@pytest.mark.parametrize(("images", "size"), [(60, 60), (4096, 4096), (100_000, 4096)])
def test_the_sample_is_spread_over_the_corpus(images, size):
    found = duplicate_precision.sample(images)
    assert len(found) == size
    assert found[0] == 0
    assert found[-1] == images - 1
    assert np.diff(found).max() <= images / size + 1


def test_equal_images_make_no_infinite_tail():
    tails = duplicate_precision.fit_null_model(np.ones((4, duplicate_precision.NEIGHBOURS)), 60)
    assert np.isfinite(tails.false_pairs(np.array([1.0, 0.5]))).all()

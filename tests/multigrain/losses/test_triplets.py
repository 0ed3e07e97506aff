import itertools
import math
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multigrain.losses.triplets import draw_triplets, negative_weights, positive_pairs, sample_triplets

MODES = ["distance_weighted", "uniform", "reference"]


def chord(distance):
    """The angle, in degrees, of two points of the unit circle so far apart."""
    return math.degrees(2 * math.asin(distance / 2))


def planar(degrees, channels):
    points = torch.zeros(len(degrees), channels, dtype=torch.float64)
    for row, angle in enumerate(degrees):
        points[row, 0], points[row, 1] = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return points


def random_points(rows, channels, seed, signed=True):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    if not signed:
        points = points.abs()
    return points / points.norm(dim=1, keepdim=True)


def clusters(ids, channels, spread, noise, seed=0):
    """Unit vectors in clouds, one for each image: `spread` sets the clouds apart, `noise` their views."""
    centres = random_points(max(ids) + 1, channels, seed) * spread + random_points(1, channels, seed + 1)
    points = centres / centres.norm(dim=1, keepdim=True)
    points = points[torch.tensor(ids)] + noise * random_points(len(ids), channels, seed + 2)
    return points / points.norm(dim=1, keepdim=True)


def weights_by_loop(points, ids, cutoff=0.5, nonzero_loss_cutoff=1.4, dimension=0):
    points, ids = points.double(), ids.tolist()
    size = len(points)
    n = dimension or points.shape[1]
    weights = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        others = [j for j in range(size) if ids[j] != ids[i]]
        distance = {j: (points[i] - points[j]).norm().item() for j in others}
        near = [j for j in others if distance[j] < nonzero_loss_cutoff]
        logs = dict.fromkeys(others, 0.0)
        if near:
            logs = {}
            for j in near:
                d = max(distance[j], cutoff)
                logs[j] = -((n - 2) * math.log(d) + (n - 3) / 2 * math.log(1 - d * d / 4))
        peak = max(logs.values(), default=0)
        total = sum(math.exp(value - peak) for value in logs.values())
        for j, value in logs.items():
            weights[i, j] = math.exp(value - peak) / total
    return weights


def reference_by_loop(points, ids, cutoff=0.5, nonzero_loss_cutoff=1.4):
    """One maximum for the whole matrix, and an exponential in single precision; a view is 1 away from itself."""
    points, size = points.double().numpy(), len(ids)
    logs, counted = np.zeros((size, size)), np.zeros((size, size))
    for i, j in itertools.product(range(size), repeat=2):
        distance = 1.0 if i == j else float(np.linalg.norm(points[i] - points[j]))
        d, n = max(distance, cutoff), points.shape[1]
        logs[i, j] = -((n - 2) * math.log(d) + (n - 3) / 2 * math.log(1 - d * d / 4))
        counted[i, j] = ids[i] != ids[j] and distance < nonzero_loss_cutoff
    shares = np.exp((logs - logs.max()).astype(np.float32)).astype(float) * counted
    for i in range(size):
        if shares[i].sum() == 0:
            shares[i] = [ids[j] != ids[i] for j in range(size)]
    return torch.from_numpy(shares / shares.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("mode", ["distance_weighted", "reference"])
@pytest.mark.parametrize(
    ("channels", "anchor", "expected"),
    [
        (3, 0, (0.562473, 0.437527)),
        (8, 0, (0.709688, 0.290312)),
        (3, 1, (0.593810, 0.406190)),
        (8, 1, (0.866486, 0.133514)),
    ],
)
def test_planar_points_have_the_worked_out_probabilities(channels, anchor, expected, mode):
    weights = negative_weights(planar([0, 20, 60, 80], channels), torch.tensor([0, 0, 1, 2]), mode)
    assert weights[anchor].tolist() == pytest.approx([0, 0, *expected], abs=1e-6)


@pytest.mark.parametrize("mode", ["distance_weighted", "reference"])
def test_a_point_beyond_the_cutoff_gets_nothing_while_nearer_ones_exist(mode):
    weights = negative_weights(planar([0, 20, 60, 80, 110], 8), torch.tensor([0, 0, 1, 2, 3]), mode)
    assert weights[0].tolist() == pytest.approx([0, 0, 0.709688, 0.290312, 0], abs=1e-6)
    assert weights[2].tolist() == pytest.approx([0.021593, 0.140138, 0, 0.791092, 0.047177], abs=1e-6)
    assert weights[3].tolist() == pytest.approx([0.006002, 0.014671, 0.537501, 0, 0.441826], abs=1e-6)


@pytest.mark.parametrize(("mode", "expected"), [("distance_weighted", 1), ("reference", 1), ("uniform", 0)])
def test_a_row_without_a_near_negative_is_uniform_and_counted(mode, expected):
    # 95 and 100 degrees are 1.47 and 1.53 from 0, but 95 is 1.35 from 10.
    points, ids = planar([0, 10, 95, 100], 8), torch.tensor([0, 0, 1, 2])
    assert negative_weights(points, ids, mode)[0].tolist() == [0, 0, 0.5, 0.5]
    assert draw_triplets(points, ids, mode)[1].tolist() == [expected]


@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.sampled_from([2, 3, 4, 8, 64]),
    st.booleans(),
    st.sampled_from([(0.5, 1.4), (0.9, 1.2), (0.1, 1.0)]),
    st.sampled_from([0, 1, 2, 3, 16, 200]),
)
@settings(deadline=None, max_examples=80)
def test_rows_are_the_softmax_of_the_log_weights_of_their_candidates(seed, ids, channels, signed, cutoffs, dimension):
    points, ids = random_points(len(ids), channels, seed, signed), torch.tensor(ids)
    weights = negative_weights(points, ids, "distance_weighted", *cutoffs, dimension)
    assert torch.allclose(weights, weights_by_loop(points, ids, *cutoffs, dimension), atol=1e-6)


@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.sampled_from(MODES),
)
@settings(deadline=None, max_examples=50)
def test_rows_sum_to_1_or_to_0_without_another_image(seed, ids, mode):
    weights = negative_weights(random_points(len(ids), 6, seed).float(), torch.tensor(ids), mode)
    for row, own in zip(weights, ids, strict=True):
        assert row.sum().item() == pytest.approx(float(any(other != own for other in ids)), abs=1e-5)
        assert all(row[j] == 0 for j, other in enumerate(ids) if other == own)


def test_uniform_weights_know_no_distance():
    # 180 degrees lies beyond the cutoff of the other mode.
    weights = negative_weights(planar([0, 5, 90, 180], 2), torch.tensor([7, 7, 3, 9]), "uniform")
    third = 1 / 3
    expected = [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [third, third, 0, third], [third, third, third, 0]]
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float64))


def test_2048_channels_in_single_precision_do_not_underflow_to_uniform():
    # Copies 0.3 apart weigh e^1484, other images, about 1.2 apart, e^100: the first may not swallow the second.
    ids = torch.arange(10).repeat_interleave(3)
    points = clusters(ids.tolist(), 2048, spread=1.6, noise=0.2).float()
    # One hard pair, which may not swallow the rest, either.
    points[3] = points[0]
    weights = negative_weights(points, ids).double()
    expected = weights_by_loop(points, ids)
    # Single precision knows log weights of some hundreds to about 1e-3.
    assert torch.allclose(weights, expected, rtol=2e-2, atol=1e-5)
    # Nearly all weight lies on one negative; a lower dimension spreads it.
    assert effective_negatives(weights) < 2
    soft = negative_weights(points, ids, dimension=64).double()
    assert torch.allclose(soft, weights_by_loop(points, ids, dimension=64), rtol=2e-3, atol=1e-6)
    assert effective_negatives(soft) > 10


def effective_negatives(weights):
    return torch.special.entr(weights).sum(dim=1).mean().exp().item()


@pytest.mark.parametrize(
    ("channels", "spread", "noise", "uniform_rows"),
    [
        # Copies 0.3 apart, other images 1.2: what the released code was seen to do at 2048 and at 128 channels.
        (2048, 1.6, 0.2, 30),
        (128, 1.6, 0.2, 0),
        # Copies 0.95 apart, other images 1.0: from 7 to 24 of a row's columns keep a weight.
        (2048, 0.3, 0.9, 0),
        # Copies 1.2 apart, others 1.3: at 2048 channels, only the diagonal stands above them, by e^200.
        (2048, 1.0, 1.7, 30),
        (256, 1.0, 1.7, 0),
    ],
)
def test_reference_weights_are_those_of_one_maximum_in_single_precision(channels, spread, noise, uniform_rows):
    ids = torch.arange(10).repeat_interleave(3)
    points = clusters(ids.tolist(), channels, spread, noise).float()
    weights = negative_weights(points, ids, "reference").double()
    assert torch.allclose(weights, reference_by_loop(points, ids.tolist()), rtol=2e-2, atol=1e-5)
    uniform = negative_weights(points, ids, "uniform").double()
    assert (weights == uniform).all(dim=1).sum() == uniform_rows
    assert draw_triplets(points, ids, "reference")[1].tolist() == [uniform_rows]
    if channels <= 128:
        assert torch.allclose(weights, negative_weights(points, ids).double(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(("channels", "farthest"), [(2048, 0.528), (512, 0.625), (256, 0.794), (128, 1.4)])
def test_one_near_pair_leaves_reference_weights_to_the_nearest_negatives_alone(channels, farthest):
    # Two copies 0.3 apart, a negative on either side of the farthest distance, and others out of reach.
    for distance, expected in [(farthest - 0.003, [0, 0, 1, 0]), (farthest + 0.003, [0, 0, 0.5, 0.5])]:
        points = planar([0, -chord(0.3), chord(distance), chord(1.5)], channels)
        weights = negative_weights(points, torch.tensor([0, 0, 1, 2]), "reference")
        assert weights[0].tolist() == pytest.approx(expected, abs=1e-6)
        # The last view has none so near, but from 0.8 to 1.1 away; the near pair takes its weights, too.
        if channels > 128:
            assert weights[3].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_duplicates_of_other_images_weigh_as_much_as_any_at_the_cutoff():
    # Rounding takes about half of these cosines above 1; their weights may not be NaN.
    points = random_points(16, 2048, 0, signed=False).float().repeat(2, 1)
    for mode in ("distance_weighted", "reference"):
        weights = negative_weights(points, torch.arange(32), mode)
        assert weights.isfinite().all()
        duplicates = weights[torch.arange(32), torch.arange(32).roll(16)]
        # The others are 0.85 apart and weigh e^-900 of that.
        assert duplicates.tolist() == pytest.approx([1.0] * 32)


@pytest.mark.parametrize("nonzero_loss_cutoff", [1.4, 3.0])
@pytest.mark.parametrize("channels", [2, 3, 8, 2048])
@pytest.mark.parametrize("mode", ["distance_weighted", "reference"])
def test_opposite_descriptors_have_finite_weights(mode, channels, nonzero_loss_cutoff):
    # Two poles, each twice, so that every row meets distances of 0 and of 2.
    points = planar([0, 180, 0, 180], channels).float()
    weights = negative_weights(points, torch.arange(4), mode, nonzero_loss_cutoff=nonzero_loss_cutoff)
    assert weights.isfinite().all()
    assert weights.sum(dim=1).tolist() == pytest.approx([1] * 4)
    if nonzero_loss_cutoff < 2 and mode == "distance_weighted":
        assert weights[0].tolist() == [0, 0, 1, 0]


def test_no_gradient_flows_through_the_weights():
    points = random_points(6, 8, 0).requires_grad_()
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    for mode in MODES:
        assert not negative_weights(points, ids, mode).requires_grad


@given(
    st.lists(st.integers(-3, 3) | st.sampled_from([2**31, -(2**62)]), max_size=14),
    st.just(slice(None)) | st.tuples(st.integers(0, 14), st.integers(0, 14)).map(lambda ends: slice(*sorted(ends))),
)
@settings(deadline=None, max_examples=100)
def test_positive_pairs_are_those_of_the_double_loop_by_anchor(ids, rows):
    expected = []
    for anchor in range(len(ids))[rows]:
        copies = [view for view in range(len(ids)) if view != anchor and ids[view] == ids[anchor]]
        expected += [(anchor, positive, position) for position, positive in enumerate(copies)]
    if len(set(ids)) < 2:
        expected = []
    pairs = positive_pairs(torch.tensor(ids, dtype=torch.int64), rows)
    assert list(zip(*(indices.tolist() for indices in pairs), strict=True)) == expected
    assert {(indices.dtype, indices.device.type) for indices in pairs} == {(torch.int64, "cpu")}


@given(st.integers(0, 2**31), st.lists(st.integers(-3, 3), min_size=2, max_size=14), st.sampled_from(MODES))
@settings(deadline=None, max_examples=50)
def test_every_ordered_pair_of_copies_comes_once_with_a_negative_of_another_image(seed, ids, mode):
    points = random_points(len(ids), 4, seed)
    anchors, positives, negatives = (t.tolist() for t in sample_triplets(points, torch.tensor(ids), mode))
    expected = [(i, j) for i in range(len(ids)) for j in range(len(ids)) if i != j and ids[i] == ids[j]]
    if len(set(ids)) == 1:
        expected = []
    assert sorted(zip(anchors, positives, strict=True)) == expected
    assert len(negatives) == len(anchors)
    assert all(ids[negative] != ids[anchor] for anchor, negative in zip(anchors, negatives, strict=True))


@pytest.mark.parametrize("ids", [[], [4], [4, 4, 4], [1, 2, 3]], ids=["nothing", "one view", "one image", "no copies"])
def test_a_batch_without_copies_or_another_image_has_no_triplets(ids):
    for indices in sample_triplets(random_points(len(ids), 4, 0), torch.tensor(ids, dtype=torch.int64)):
        assert indices.shape == (0,)
        assert indices.dtype == torch.int64


@pytest.mark.parametrize(
    ("mode", "cutoffs", "expected"),
    [
        ("distance_weighted", (0.5, 1.4), (0.709688, 0.290312, 0)),
        # 60 and 80 degrees are 1.0 and 1.2856 away: below this cutoff they weigh alike.
        ("distance_weighted", (1.3, 1.4), (0.5, 0.5, 0)),
        ("distance_weighted", (0.5, 1.1), (1, 0, 0)),
        ("uniform", (0.5, 1.4), (1 / 3, 1 / 3, 1 / 3)),
        # 99 draws cannot differ: as the released code, with replacement.
        ("reference", (0.5, 1.4), (0.709688, 0.290312, 0)),
    ],
)
def test_negatives_are_drawn_with_their_weights(mode, cutoffs, expected):
    # 100 copies at one place have one distribution, and draw from it 9,900 times.
    copies = 100
    points, ids = planar([0] * copies + [60, 80, 110], 8), torch.tensor([0] * copies + [1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    negatives = sample_triplets(points, ids, mode, generator, *cutoffs).negatives
    counts = torch.bincount(negatives, minlength=copies + 3)[copies:]
    draws = copies * (copies - 1)
    assert counts.sum() == len(negatives) == draws
    # Hoeffding: a frequency is off by more than 0.03 with a probability below 2 exp(-2 * 9900 * 0.03^2) = 4e-8.
    assert (counts / draws).tolist() == pytest.approx(expected, abs=0.03)
    assert all(count == 0 for count, share in zip(counts.tolist(), expected, strict=True) if share == 0)


def test_the_pairs_of_one_anchor_draw_independently():
    copies = 60
    ids = torch.tensor([0] * copies + [1, 2])
    triplets = sample_triplets(planar([0] * copies + [60, 80], 8), ids, generator=torch.Generator().manual_seed(0))
    for anchor in range(copies):
        drawn = triplets.negatives[triplets.anchors == anchor]
        # 59 draws leave out the rarer one, of probability 0.29, with a probability of 2e-9.
        assert set(drawn.tolist()) == {copies, copies + 1}


def test_the_draw_depends_on_the_generator_alone():
    points, ids = random_points(12, 5, 0), torch.arange(4).repeat_interleave(3)
    drawn = []
    for seed, elsewhere in [(3, 0), (3, 1), (4, 0)]:
        torch.manual_seed(elsewhere)
        drawn.append(sample_triplets(points, ids, "uniform", torch.Generator().manual_seed(seed)).negatives.tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_reference_draws_of_one_anchor_are_successive_draws_without_replacement():
    # Three copies draw two each; 60, 70 and 80 degrees have weights, 110 has none.
    points, ids = planar([0, 0, 0, 60, 70, 80, 110], 8), torch.tensor([0, 0, 0, 1, 2, 3, 4])
    share = weights_by_loop(points, ids)[0].tolist()
    expected = {(a, b): share[a] * share[b] / (1 - share[a]) for a, b in itertools.permutations((3, 4, 5), 2)}
    generator, counts, batches = torch.Generator().manual_seed(0), Counter(), 1500
    for _ in range(batches):
        triplets = sample_triplets(points, ids, "reference", generator)
        assert triplets.anchors.tolist() == [0, 0, 1, 1, 2, 2]
        counts.update(map(tuple, triplets.negatives.view(3, 2).tolist()))
    # Hoeffding: a frequency is off by more than 0.045 with a probability below 2 exp(-2 * 4500 * 0.045^2) = 3e-8.
    assert {pair: count / (3 * batches) for pair, count in counts.items()} == pytest.approx(expected, abs=0.045)


@given(st.integers(0, 2**31), st.sampled_from([4, 512]))
@settings(deadline=None, max_examples=50)
def test_reference_draws_of_one_anchor_differ_while_enough_columns_have_weight(seed, channels):
    ids = torch.tensor([0, 1, 1, 1, 1, 2, 2, 3, 0, 4])
    points = random_points(len(ids), channels, seed)
    weights = negative_weights(points, ids, "reference")
    triplets = sample_triplets(points, ids, "reference", torch.Generator().manual_seed(seed))
    for anchor in triplets.anchors.unique():
        drawn = triplets.negatives[triplets.anchors == anchor].tolist()
        # The group of four draws three.
        assert len(set(drawn)) == len(drawn) or (weights[anchor] > 0).sum() < 3
        assert (weights[anchor, drawn] > 0).all()


EXTREMES = [0.0, 0.5, 1 - 2**-53]


@given(st.integers(0, 2**31), st.sampled_from(MODES), st.sampled_from([*([u] for u in EXTREMES), EXTREMES]))
@settings(deadline=None, max_examples=60)
def test_no_uniform_numbers_draw_a_column_without_weight(seed, mode, extremes):
    # The first and the last column have none; the reference finds as many others as it draws.
    points, ids = planar([110, 0, 60, 0, 80, 0, 110], 8), torch.tensor([1, 0, 2, 0, 3, 0, 4])
    rng = np.random.default_rng(seed)

    def rand(*shape, dtype, **_):
        return torch.from_numpy(rng.choice(extremes, shape)).to(dtype)

    with patch("multigrain.losses.triplets.torch.rand", rand):
        triplets = sample_triplets(points, ids, mode)
    assert triplets.anchors.tolist() == [1, 1, 3, 3, 5, 5]
    assert (negative_weights(points, ids, mode)[triplets.anchors, triplets.negatives] > 0).all()


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_ranks_in_the_same_state_draw_what_one_process_would(data):
    world, own = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    ids = data.draw(st.lists(st.integers(0, 6), min_size=world * own, max_size=world * own))
    mode, channels = data.draw(st.sampled_from(MODES)), data.draw(st.sampled_from([4, 512]))
    # Copies are 0.3 apart, images 0.9: in the reference, one rank's copies cost the others' their weights.
    points = clusters(ids, channels, spread=0.85, noise=0.2, seed=data.draw(st.integers(0, 2**31)))
    ids, seed = torch.tensor(ids), data.draw(st.integers(0, 2**31))

    def draw(rows):
        return draw_triplets(points, ids, mode, torch.Generator().manual_seed(seed), rows=rows)

    whole, fallback = draw(slice(None))
    ranks = [draw(slice(rank * own, (rank + 1) * own)) for rank in range(world)]
    for together, *parts in zip(whole, *(triplets for triplets, _ in ranks), strict=True):
        assert torch.cat(parts).tolist() == together.tolist()
    assert sum(count.item() for _, count in ranks) == fallback.item()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_ids_of_any_integer_type_give_the_same_triplets(dtype):
    points, ids = random_points(9, 5, 0), torch.arange(3).repeat_interleave(3)
    one, other = (sample_triplets(points, x, "uniform", torch.Generator().manual_seed(1)) for x in (ids, ids.to(dtype)))
    assert [indices.tolist() for indices in one] == [indices.tolist() for indices in other]

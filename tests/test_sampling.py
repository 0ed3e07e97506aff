import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multigrain.sampling import negative_weights, pairwise_distances, sample_triplets


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


def weights_by_loop(points, ids, cutoff=0.5, nonzero_loss_cutoff=1.4):
    points, ids = points.double(), ids.tolist()
    size, channels = points.shape
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
                logs[j] = -((channels - 2) * math.log(d) + (channels - 3) / 2 * math.log(1 - d * d / 4))
        peak = max(logs.values(), default=0)
        total = sum(math.exp(value - peak) for value in logs.values())
        for j, value in logs.items():
            weights[i, j] = math.exp(value - peak) / total
    return weights


@given(st.integers(0, 2**31), st.integers(1, 8), st.sampled_from([1, 2, 3, 40]))
@settings(deadline=None, max_examples=50)
def test_pairwise_distances_are_those_of_the_loop(seed, rows, channels):
    points = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = [[math.dist(a, b) for b in points.tolist()] for a in points.tolist()]
    assert torch.allclose(pairwise_distances(points), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "anchor", "expected"),
    [
        (3, 0, (0.562473, 0.437527)),
        (8, 0, (0.709688, 0.290312)),
        (3, 1, (0.593810, 0.406190)),
        (8, 1, (0.866486, 0.133514)),
    ],
)
def test_planar_points_have_the_worked_out_probabilities(channels, anchor, expected):
    weights = negative_weights(planar([0, 20, 60, 80], channels), torch.tensor([0, 0, 1, 2]))
    assert weights[anchor].tolist() == pytest.approx([0, 0, *expected], abs=1e-6)


def test_a_point_beyond_the_cutoff_gets_nothing_while_nearer_ones_exist():
    weights = negative_weights(planar([0, 20, 60, 80, 110], 8), torch.tensor([0, 0, 1, 2, 3]))
    assert weights[0].tolist() == pytest.approx([0, 0, 0.709688, 0.290312, 0], abs=1e-6)
    assert weights[2].tolist() == pytest.approx([0.021593, 0.140138, 0, 0.791092, 0.047177], abs=1e-6)
    assert weights[3].tolist() == pytest.approx([0.006002, 0.014671, 0.537501, 0, 0.441826], abs=1e-6)


def test_a_row_without_a_near_negative_is_uniform():
    weights = negative_weights(planar([0, 10, 95, 100], 8), torch.tensor([0, 0, 1, 2]))
    assert weights[0].tolist() == [0, 0, 0.5, 0.5]


@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.sampled_from([2, 3, 4, 8, 64]),
    st.booleans(),
    st.sampled_from([(0.5, 1.4), (0.9, 1.2), (0.1, 1.0)]),
)
@settings(deadline=None, max_examples=80)
def test_rows_are_the_softmax_of_the_log_weights_of_their_candidates(seed, ids, channels, signed, cutoffs):
    points, ids = random_points(len(ids), channels, seed, signed), torch.tensor(ids)
    weights = negative_weights(points, ids, "distance_weighted", *cutoffs)
    assert torch.allclose(weights, weights_by_loop(points, ids, *cutoffs), atol=1e-6)


@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.sampled_from(["uniform", "distance_weighted"]),
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
    views, images = 3, 10
    ids = torch.arange(images).repeat_interleave(views)
    noise = random_points(views * images, 2048, 1)
    centres = random_points(images, 2048, 0) + 0.6 * random_points(1, 2048, 2)
    points = centres / centres.norm(dim=1, keepdim=True)
    points = points[ids] + 0.2 * noise
    points = (points / points.norm(dim=1, keepdim=True)).float()
    weights = negative_weights(points, ids)
    expected = weights_by_loop(points, ids)
    # Single precision knows log weights of some hundreds to about 1e-3.
    assert torch.allclose(weights.double(), expected, rtol=2e-2, atol=1e-5)
    assert (weights.max(dim=1).values > 3 / (len(ids) - views)).all()


def test_duplicates_of_other_images_weigh_as_much_as_any_at_the_cutoff():
    # Rounding makes about half of these squared distances negative; their roots may not be NaN.
    points = random_points(16, 2048, 0, signed=False).float().repeat(2, 1)
    distances = pairwise_distances(points)
    assert distances.isfinite().all()
    weights = negative_weights(points, torch.arange(32))
    assert weights.isfinite().all()
    duplicates = weights[torch.arange(32), torch.arange(32).roll(16)]
    # The others are 0.85 apart and weigh e^-900 of that.
    assert duplicates.tolist() == pytest.approx([1.0] * 32)


@pytest.mark.parametrize("nonzero_loss_cutoff", [1.4, 3.0])
@pytest.mark.parametrize("channels", [2, 3, 8, 2048])
def test_opposite_descriptors_have_finite_weights(channels, nonzero_loss_cutoff):
    # Two poles, each twice, so that every row meets distances of 0 and of 2.
    points = planar([0, 180, 0, 180], channels).float()
    weights = negative_weights(points, torch.arange(4), nonzero_loss_cutoff=nonzero_loss_cutoff)
    assert weights.isfinite().all()
    assert weights.sum(dim=1).tolist() == pytest.approx([1] * 4)
    if nonzero_loss_cutoff < 2:
        assert weights[0].tolist() == [0, 0, 1, 0]


def test_no_gradient_flows_through_the_weights():
    points = random_points(6, 8, 0).requires_grad_()
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    for mode in ("uniform", "distance_weighted"):
        assert not negative_weights(points, ids, mode).requires_grad


@given(st.integers(0, 2**31), st.lists(st.integers(-3, 3), min_size=2, max_size=14))
@settings(deadline=None, max_examples=50)
def test_every_ordered_pair_of_copies_comes_once_with_a_negative_of_another_image(seed, ids):
    points = random_points(len(ids), 4, seed)
    anchors, positives, negatives = (t.tolist() for t in sample_triplets(points, torch.tensor(ids)))
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

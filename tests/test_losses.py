import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multigrain.losses import MarginLoss, alone, distance, joint_loss, margin_loss, margin_terms
from multigrain.sampling import Triplets, sample_triplets

DISTANCES = st.floats(0, 2)
PAIRS = st.lists(st.tuples(DISTANCES, DISTANCES), max_size=12)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def margin_by_loop(pairs, beta, margin):
    terms = [max(0, a - beta + margin) for a, _ in pairs] + [max(0, beta - n + margin) for _, n in pairs]
    return sum(terms) / max(1, sum(term > 0 for term in terms))


# Positive terms 0, 0.3, 0.1 and negative terms 0.1, 0.05, 0.5: five are active.
THREE = (doubles([0.5, 1.3, 1.1]), doubles([1.3, 1.35, 0.9]))


def test_margin_terms_are_the_excess_over_the_boundary_and_the_lack_of_it():
    assert margin_terms(*THREE, doubles(1.2), 0.2).tolist() == pytest.approx([0, 0.3, 0.1, 0.1, 0.05, 0.5])


def test_margin_loss_is_the_mean_of_the_five_active_terms():
    beta = doubles(1.2).requires_grad_()
    loss = margin_loss(*THREE, beta)
    assert loss.item() == pytest.approx(1.05 / 5)
    loss.backward()
    # Three negative terms grow with beta, two positive ones shrink.
    assert beta.grad.item() == pytest.approx((3 - 2) / 5)


def test_gradients_wrt_distances_are_shared_by_the_active_terms():
    d_ap, d_an = (tensor.clone().requires_grad_() for tensor in THREE)
    margin_loss(d_ap, d_an, doubles(1.2)).backward()
    assert d_ap.grad.tolist() == pytest.approx([0, 0.2, 0.2])
    assert d_an.grad.tolist() == pytest.approx([-0.2, -0.2, -0.2])


@given(PAIRS, st.floats(0.1, 2), st.floats(0.01, 1))
@settings(deadline=None, max_examples=50)
def test_margin_loss_is_that_of_the_loop(pairs, beta, margin):
    d_ap, d_an = doubles([a for a, _ in pairs]), doubles([n for _, n in pairs])
    loss = margin_loss(d_ap, d_an, doubles(beta), margin)
    assert loss.item() == pytest.approx(margin_by_loop(pairs, beta, margin), abs=1e-12)


@pytest.mark.parametrize("pairs", [[(0.3, 1.5)], []], ids=["none active", "no triplets"])
def test_margin_loss_without_an_active_term_is_0_with_finite_gradients(pairs):
    d_ap, d_an = (doubles([pair[side] for pair in pairs]).requires_grad_() for side in (0, 1))
    beta = doubles(1.2).requires_grad_()
    loss = margin_loss(d_ap, d_an, beta)
    assert loss.item() == 0
    loss.backward()
    assert beta.grad.item() == 0
    assert d_ap.grad.tolist() == d_an.grad.tolist() == [0] * len(pairs)


@given(st.lists(PAIRS, min_size=1, max_size=8))
@settings(deadline=None, max_examples=50)
def test_the_mean_over_ranks_is_the_loss_and_the_gradient_of_the_whole_batch(ranks):
    tensors = [(doubles([a for a, _ in pairs]), doubles([n for _, n in pairs])) for pairs in ranks]
    counts = []
    for d_ap, d_an in tensors:
        margin_loss(d_ap, d_an, doubles(1.2), average=lambda count: counts.append(count) or count)
    mean_count = torch.stack(counts).mean()

    beta = doubles(1.2).requires_grad_()
    losses = [margin_loss(d_ap, d_an, beta, average=lambda _: mean_count) for d_ap, d_an in tensors]
    shared = torch.stack(losses).mean()
    whole_beta = doubles(1.2).requires_grad_()
    whole = margin_loss(torch.cat([d for d, _ in tensors]), torch.cat([d for _, d in tensors]), whole_beta)
    assert shared.item() == pytest.approx(whole.item(), abs=1e-12)
    assert shared.item() == pytest.approx(margin_by_loop([pair for rank in ranks for pair in rank], 1.2, 0.2))
    shared.backward()
    whole.backward()
    assert beta.grad.item() == pytest.approx(whole_beta.grad.item(), abs=1e-12)


def test_one_active_term_on_four_ranks_counts_as_one():
    # The mean over ranks, 0.25, lies below 1 and may not be raised to it.
    ranks = [(doubles([1.3]), doubles([1.5])), *[(doubles([0.3]), doubles([1.5]))] * 3]
    losses = [margin_loss(*rank, doubles(1.2), average=lambda _: doubles(0.25)).item() for rank in ranks]
    assert sum(losses) / 4 == pytest.approx(0.3)


def test_distance_is_euclidean_with_a_floor_under_its_root():
    a, b = doubles([[1.0, 2.0, 2.0], [1.0, 0.0, 0.0]]), doubles([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert distance(a, b).tolist() == pytest.approx([math.sqrt(9 + 1e-8), 1e-4], rel=1e-12)


def planar(degrees):
    return torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees])


def test_two_copies_and_one_other_image_have_the_worked_out_loss():
    # Chords of 40, 75 and 35 degrees: 0.684040, 1.217523, 0.601412; only the two negative terms are active.
    triplets = Triplets(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([2, 2]))
    loss, sums = MarginLoss()(planar([0, 40, 75]), triplets)
    assert loss.item() == pytest.approx((1.4 - 1.217523 + 1.4 - 0.601412) / 2, abs=1e-6)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(
        {"triplets": 2, "active": 2, "positive_distance": 2 * 0.684040, "negative_distance": 1.217523 + 0.601412},
        abs=1e-5,
    )


def test_the_modules_sums_count_active_terms_not_triplets_and_carry_no_gradient():
    # Chords of 100 and 20 degrees, 1.532 and 0.347: both terms of the one triplet are active.
    triplets = Triplets(torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
    loss, sums = MarginLoss()(planar([0, 100, 20]).requires_grad_(), triplets)
    assert sums["triplets"].item() == 1
    assert sums["active"].item() == 2
    assert loss.requires_grad
    assert not any(value.requires_grad for value in sums.values())


def test_the_module_learns_its_boundary_from_where_it_was_set():
    module = MarginLoss(beta=0.9, margin=0.1)
    assert [parameter.item() for parameter in module.parameters()] == [pytest.approx(0.9)]
    triplets = Triplets(torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
    loss, _ = module(planar([0, 60, 30]), triplets)
    # Chords of 60 and 30 degrees, 1 and 0.517638: terms 0.2 and 0.482362.
    assert loss.item() == pytest.approx((0.2 + 0.482362) / 2, abs=1e-6)
    loss.backward()
    assert module.beta.grad.item() == 0
    assert MarginLoss().beta.item() == pytest.approx(1.2)
    assert MarginLoss().margin == 0.2


def test_the_module_averages_its_count_over_ranks():
    triplets = Triplets(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([2, 2]))
    loss, sums = MarginLoss()(planar([0, 40, 75]), triplets, average=lambda count: 4 * count)
    assert loss.item() == pytest.approx(0.490533 / 4, abs=1e-6)
    # The log's sums are of this rank.
    assert sums["active"].item() == 2


def test_duplicates_and_opposites_have_finite_gradients():
    points = planar([0, 0, 0, 0, 180, 180]).requires_grad_()
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    module = MarginLoss()
    for mode in ("uniform", "distance_weighted"):
        triplets = sample_triplets(points.detach(), ids, mode, torch.Generator().manual_seed(0))
        loss, _ = module(points, triplets)
        loss.backward()
        assert loss.isfinite()
        assert points.grad.isfinite().all()
        assert module.beta.grad.isfinite()


def test_no_triplets_give_a_zero_loss_that_still_reaches_descriptors_and_boundary():
    # A rank without triplets must send zeros, not nothing, to the others.
    points, module = planar([0, 90]).requires_grad_(), MarginLoss()
    loss, sums = module(points, sample_triplets(points.detach(), torch.tensor([0, 1])))
    loss.backward()
    assert loss.item() == 0
    assert points.grad.abs().sum() == 0
    assert module.beta.grad.item() == 0
    assert [value.item() for value in sums.values()] == [0, 0, 0, 0]


LOGITS, LABELS = doubles([[2, 0, -1], [0, 1, 0]]), torch.tensor([0, 2])


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 0.21), (0.5, 0.535323), (1.0, 0.860645)])
def test_joint_loss_mixes_cross_entropy_and_margin_loss(weight, expected):
    # ln(1 + e^-2 + e^-3) and ln(2 + e), averaged
    entropy = (math.log(1 + math.exp(-2) + math.exp(-3)) + math.log(2 + math.e)) / 2
    losses = joint_loss(LOGITS, LABELS, margin_loss(*THREE, doubles(1.2)), weight)
    assert losses.classification.item() == pytest.approx(entropy)
    assert losses.margin.item() == pytest.approx(0.21)
    assert losses.loss.item() == pytest.approx(expected, abs=1e-6)


def test_joint_loss_weighs_the_gradients_of_its_parts():
    logits, beta = LOGITS.clone().requires_grad_(), doubles(1.2).requires_grad_()
    joint_loss(logits, LABELS, margin_loss(*THREE, beta), weight=0.25).loss.backward()
    assert beta.grad.item() == pytest.approx(0.75 * 0.2)
    softmax = math.e / (2 + math.e)
    assert logits.grad[1].tolist() == pytest.approx(
        [0.125 * (1 - softmax) / 2, 0.125 * softmax, 0.125 * ((1 - softmax) / 2 - 1)]
    )


def test_alone_is_the_identity():
    assert alone(doubles(3.5)).item() == 3.5

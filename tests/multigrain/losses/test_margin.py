import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from multigrain.losses.margin import (
    MarginLoss,
    classification_loss,
    distance,
    entropy_loss,
    margin_loss,
    margin_terms,
)
from multigrain.losses.triplets import Triplets, sample_triplets

DISTANCES = st.floats(0, 2)
PAIRS = st.lists(st.tuples(DISTANCES, DISTANCES), max_size=12)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


NORMALISATIONS = ["active", "triplets", "pairs"]


def margin_by_loop(pairs, beta, margin, normalise="active"):
    total, count = 0.0, 0
    for a, n in pairs:
        terms = max(0.0, a - beta + margin), max(0.0, beta - n + margin)
        total += sum(terms)
        active = sum(term > 0 for term in terms)
        count += {"active": active, "triplets": min(active, 1), "pairs": 2}[normalise]
    return total / max(1, count)


# Positive terms 0, 0.3, 0.1 and negative terms 0.1, 0.05, 0.5: five are active.
THREE = (doubles([0.5, 1.3, 1.1]), doubles([1.3, 1.35, 0.9]))


def test_margin_terms_are_the_excess_over_the_boundary_and_the_lack_of_it():
    over, under = margin_terms(*THREE, doubles(1.2), 0.2).tolist()
    assert over == pytest.approx([0, 0.3, 0.1])
    assert under == pytest.approx([0.1, 0.05, 0.5])


@pytest.mark.parametrize(("normalise", "expected"), [("active", 0.21), ("triplets", 0.35), ("pairs", 0.175)])
def test_the_terms_are_summed_over_what_is_counted(normalise, expected):
    beta = doubles(1.2).requires_grad_()
    d_ap, d_an = (tensor.clone().requires_grad_() for tensor in THREE)
    loss = margin_loss(d_ap, d_an, beta, normalise=normalise)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    # Five terms above zero, three triplets that have one, six terms in all.
    count = {"active": 5, "triplets": 3, "pairs": 6}[normalise]
    # Three negative terms grow with beta, two positive ones shrink.
    assert beta.grad.item() == pytest.approx((3 - 2) / count)
    assert d_ap.grad.tolist() == pytest.approx([0, 1 / count, 1 / count])
    assert d_an.grad.tolist() == pytest.approx([-1 / count] * 3)


@given(PAIRS, st.floats(0.1, 2), st.floats(0.01, 1), st.sampled_from(NORMALISATIONS))
@settings(deadline=None, max_examples=50)
def test_margin_loss_is_that_of_the_loop(pairs, beta, margin, normalise):
    d_ap, d_an = doubles([a for a, _ in pairs]), doubles([n for _, n in pairs])
    loss = margin_loss(d_ap, d_an, doubles(beta), margin, normalise)
    assert loss.item() == pytest.approx(margin_by_loop(pairs, beta, margin, normalise), abs=1e-12)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
@pytest.mark.parametrize("pairs", [[(0.3, 1.5)], []], ids=["none active", "no triplets"])
def test_margin_loss_without_an_active_term_is_0_with_zero_gradients(pairs, normalise):
    d_ap, d_an = (doubles([pair[side] for pair in pairs]).requires_grad_() for side in (0, 1))
    beta = doubles(1.2).requires_grad_()
    loss = margin_loss(d_ap, d_an, beta, normalise=normalise)
    assert loss.item() == 0
    loss.backward()
    assert beta.grad.item() == 0
    assert d_ap.grad.tolist() == d_an.grad.tolist() == [0] * len(pairs)


@given(st.lists(PAIRS, min_size=1, max_size=8), st.sampled_from(NORMALISATIONS))
@settings(deadline=None, max_examples=50)
def test_the_mean_over_ranks_is_the_loss_and_the_gradient_of_the_whole_batch(ranks, normalise):
    tensors = [(doubles([a for a, _ in pairs]), doubles([n for _, n in pairs])) for pairs in ranks]
    counts = []
    for d_ap, d_an in tensors:
        margin_loss(d_ap, d_an, doubles(1.2), normalise=normalise, average=lambda count: counts.append(count) or count)
    mean_count = torch.stack(counts).mean()

    beta = doubles(1.2).requires_grad_()
    losses = [margin_loss(*rank, beta, normalise=normalise, average=lambda _: mean_count) for rank in tensors]
    shared = torch.stack(losses).mean()
    whole_beta = doubles(1.2).requires_grad_()
    whole = margin_loss(*(torch.cat(side) for side in zip(*tensors, strict=True)), whole_beta, normalise=normalise)
    assert shared.item() == pytest.approx(whole.item(), abs=1e-12)
    assert shared.item() == pytest.approx(
        margin_by_loop([pair for rank in ranks for pair in rank], 1.2, 0.2, normalise)
    )
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
    assert loss.item() == pytest.approx(0.490533, abs=1e-6)
    # Each triplet has an active term; of four terms, two are active.
    for normalise, share in [("triplets", 1), ("pairs", 0.5)]:
        other, same = MarginLoss(normalise=normalise)(planar([0, 40, 75]), triplets)
        assert other.item() == pytest.approx(0.490533 * share, abs=1e-6)
        assert same == sums
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


@pytest.mark.parametrize("channels", [2, 2048])
@pytest.mark.parametrize("mode", ["uniform", "distance_weighted", "reference"])
def test_duplicates_and_opposites_have_finite_gradients(mode, channels):
    points = functional.pad(planar([0, 0, 0, 0, 180, 180]), (0, channels - 2)).requires_grad_()
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    module = MarginLoss()
    triplets = sample_triplets(points.detach(), ids, mode, torch.Generator().manual_seed(0))
    loss, _ = module(points, triplets)
    for value in (loss, entropy_loss(points, ids)):
        value.backward()
        assert value.isfinite()
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


def normed(rows, channels, seed):
    points = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return points / points.norm(dim=1, keepdim=True)


def entropy_by_loop(points, ids, rows):
    logs = []
    for i in range(len(ids))[rows]:
        distances = [(points[i] - points[j]).norm().item() for j in range(len(ids)) if ids[j] != ids[i]]
        logs.append(math.log(math.sqrt(min(distances) ** 2 + 1e-8)) if distances else 0)
    return -sum(logs) / len(logs)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=10), st.integers(0, 2**31), st.sampled_from([2, 3, 40]))
@settings(deadline=None, max_examples=60)
def test_entropy_loss_is_that_of_the_loop_on_any_rows(ids, seed, channels):
    points = normed(len(ids), channels, seed)
    cut = seed % len(ids)
    for rows in (slice(None), slice(0, cut + 1), slice(cut, len(ids))):
        loss = entropy_loss(points, torch.tensor(ids), rows)
        assert loss.item() == pytest.approx(entropy_by_loop(points, ids, rows), abs=1e-6)


def test_entropy_loss_of_three_planar_views_is_worked_out():
    # Chords to the nearest other image; the copies at 0 and 1 do not count for each other.
    points = planar([0, 1, 60, 151]).double().requires_grad_()
    loss = entropy_loss(points, torch.tensor([0, 0, 1, 2]))
    chords = [2 * math.sin(math.radians(angle / 2)) for angle in (60, 59, 59, 91)]
    assert loss.item() == pytest.approx(-sum(map(math.log, chords)) / 4, abs=1e-6)
    loss.backward()
    # The last view is the nearest of none: only its own term moves it, away from the one at 60 degrees.
    away = (points[3] - points[2]).detach()
    assert points.grad[3].tolist() == pytest.approx((-away / away.square().sum() / 4).tolist(), abs=1e-6)


def test_entropy_loss_of_even_rows_averages_to_that_of_the_batch():
    points, ids = normed(12, 8, 0), torch.arange(4).repeat_interleave(3)
    parts = [entropy_loss(points, ids, slice(start, start + 3)).item() for start in range(0, 12, 3)]
    assert sum(parts) / 4 == pytest.approx(entropy_loss(points, ids).item())


@pytest.mark.parametrize("ids", [[7], [7, 7, 7]])
def test_entropy_loss_of_one_image_is_0_with_zero_gradients(ids):
    points = planar([0, 10, 10][: len(ids)]).requires_grad_()
    loss = entropy_loss(points, torch.tensor(ids))
    loss.backward()
    assert loss.item() == 0
    assert points.grad.abs().sum() == 0


LOGITS, LABELS = doubles([[2, 0, -1], [0, 1, 0]]), torch.tensor([0, 2])


def test_classification_loss_is_the_mean_cross_entropy():
    # ln(1 + e^-2 + e^-3) and ln(2 + e), averaged
    expected = (math.log(1 + math.exp(-2) + math.exp(-3)) + math.log(2 + math.e)) / 2
    assert expected == pytest.approx(0.860645, abs=1e-6)
    assert classification_loss(LOGITS, LABELS).item() == pytest.approx(expected)


def test_half_of_either_loss_is_the_worked_out_mix():
    beta = doubles(1.2).requires_grad_()
    loss = 0.5 * classification_loss(LOGITS, LABELS) + 0.5 * margin_loss(*THREE, beta)
    assert loss.item() == pytest.approx(0.535323, abs=1e-6)
    loss.backward()
    assert beta.grad.item() == pytest.approx(0.1)


@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_mixup_is_the_cross_entropy_of_mixed_embeddings_with_soft_labels(seed, size, share):
    generator = torch.Generator().manual_seed(seed)
    classifier = torch.nn.Linear(5, 4, dtype=torch.float64)
    embeddings = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    labels, order = torch.randint(4, (size,), generator=generator), torch.randperm(size, generator=generator)
    loss = classification_loss(classifier(embeddings), labels, order, share)

    expected = 0.0
    for row in range(size):
        other = order[row].item()
        mixed = classifier(share * embeddings[row] + (1 - share) * embeddings[other]).exp()
        probabilities = (mixed / mixed.sum()).tolist()
        expected -= share * math.log(probabilities[labels[row]])
        expected -= (1 - share) * math.log(probabilities[labels[other]])
    assert loss.item() == pytest.approx(expected / size)

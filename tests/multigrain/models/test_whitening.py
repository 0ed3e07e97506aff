import math

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multigrain import Whitening
from multigrain.models import whitening

FIVE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
WEIGHT = torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64)
BIAS = torch.tensor([0.1, -0.2], dtype=torch.float64)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pooled(count, channels, seed=0, dtype=torch.float64):
    """Embeddings like those after a ReLU: not negative."""
    return normal(count, channels, seed=seed, dtype=dtype).abs()


def lengths(embeddings):
    """|[e; 1]| of each row."""
    return torch.tensor([math.sqrt(sum(x * x for x in row) + 1) for row in embeddings.tolist()], dtype=torch.float64)


def covariance(z):
    """With N - 1 degrees of freedom, by a sum over rows."""
    mean = z.double().mean(dim=0)
    return sum(torch.outer(row - mean, row - mean) for row in z.double()) / (len(z) - 1)


def close(found, expected, atol):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=atol, rtol=0)


def test_five_embeddings_have_the_figures_of_the_worked_case():
    whitening = Whitening.fit(FIVE)
    close(whitening.mean, [0.545930, 0.464280, 0.485097], 1e-6)
    # A column of P has the length 1 / sqrt(eigenvalue).
    close(1 / whitening.projection.square().sum(dim=0), [0.233519, 0.079258, 0.001079], 1e-6)
    z = whitening.project(FIVE)
    assert (z[0] - z[1]).square().sum().item() == pytest.approx(4.63158, abs=1e-4)
    assert (z[0] - z[4]).square().sum().item() == pytest.approx(4.02509, abs=1e-4)
    d = whitening.transform(FIVE)
    assert (d[0] @ d[1]).item() == pytest.approx(0.017857, abs=3e-6)
    assert (d[0] @ d[4]).item() == pytest.approx(0.085428, abs=3e-6)


def test_fold_of_the_worked_case():
    whitening = Whitening.fit(FIVE)
    close(lengths(FIVE), [1.414214, 1.414214, 2.449490, 3.316625, 3.316625], 1e-6)
    close(FIVE @ WEIGHT.T + BIAS, [[1.1, 0.3], [-0.9, 1.8], [1.1, 2.8], [-1.9, 6.3], [2.1, 3.3]], 1e-12)
    weight, bias = whitening.fold(WEIGHT, BIAS)
    close(bias, [0.130159, 1.104505], 1e-6)
    expected = [
        [0.777817, 0.212132],
        [-0.636396, 1.272791],
        [0.449073, 1.143095],
        [-0.572871, 1.899521],
        [0.633174, 0.994987],
    ]
    close(whitening.project(FIVE) @ weight.T + bias, expected, 1e-6)


def test_folded_logits_are_the_original_ones_over_the_length_and_rank_the_same():
    embeddings, weight, bias = normal(400, 16), normal(7, 16, seed=1), normal(7, seed=2)
    whitening = Whitening.fit(embeddings)
    folded_weight, folded_bias = whitening.fold(weight, bias)
    logits, folded = embeddings @ weight.T + bias, whitening.project(embeddings) @ folded_weight.T + folded_bias
    close(folded * (lengths(embeddings) + 1e-6)[:, None], logits, 1e-9)
    assert folded.argmax(dim=1).tolist() == logits.argmax(dim=1).tolist()


def test_fold_of_a_classifier_in_fp32_is_given_in_fp32():
    embeddings, weight, bias = normal(400, 16).float(), normal(7, 16, seed=1).float(), normal(7, seed=2).float()
    whitening = Whitening.fit(embeddings)
    folded_weight, folded_bias = whitening.fold(weight, bias)
    assert (folded_weight.dtype, folded_bias.dtype) == (torch.float32, torch.float32)
    folded = whitening.project(embeddings) @ folded_weight.T + folded_bias
    close(folded * lengths(embeddings)[:, None].float(), embeddings @ weight.T + bias, 1e-4)


def test_fold_is_exact_where_eigenvalues_lie_below_the_floor():
    embeddings = pooled(60, 5)
    embeddings[:, 2] = 0
    whitening = Whitening.fit(embeddings, floor=0.5)
    weight, bias = whitening.fold(normal(3, 5, seed=1), normal(3, seed=2))
    others = pooled(10, 5, seed=3)  # that channel lives here
    logits = others @ normal(3, 5, seed=1).T + normal(3, seed=2)
    close((whitening.project(others) @ weight.T + bias) * (lengths(others) + 1e-6)[:, None], logits, 1e-9)


def test_fold_needs_all_directions():
    with pytest.raises(ValueError, match="needs all 3 directions, got 2; fit without a dimension"):
        Whitening.fit(FIVE, dimension=2).fold(WEIGHT, BIAS)


def test_whitened_training_set_has_mean_zero_and_covariance_one():
    z = Whitening.fit(pooled(80, 6)).project(pooled(80, 6))
    close(z.mean(dim=0), torch.zeros(7), 1e-10)
    close(covariance(z), torch.eye(7), 1e-10)


def test_ill_conditioned_embeddings_in_fp32_are_whitened_too():
    spread = torch.logspace(0, -3.5, 32, dtype=torch.float64)
    embeddings = (2 + normal(2000, 32) * spread @ torch.linalg.qr(normal(32, 32, seed=1))[0]).float()
    whitening = Whitening.fit(embeddings)
    variances = 1 / whitening.projection.square().sum(dim=0)
    assert variances[0] / variances[-1] > 1e7
    z = whitening.project(embeddings)
    assert z.dtype == torch.float32
    close(covariance(z), torch.eye(33), 1e-4)


def test_mean_far_above_the_spread_costs_no_digits():
    # A sum of raw products would keep 1e-16 of the mean's square, which is more than the spread's square.
    embeddings = torch.cat([1 + 1e-7 * normal(300, 2), 1 + normal(300, 1)], dim=1)
    close(covariance(Whitening.fit(embeddings, floor=1e-15).project(embeddings))[0, 0], 1.0, 1e-9)
    z = Whitening.fit(embeddings.split(10), floor=1e-15).project(embeddings)
    close(covariance(z).diagonal()[:3], torch.ones(3), 1e-2)


def test_dead_channel_is_not_blown_up():
    embeddings = pooled(60, 4)
    embeddings[:, 1] = 0
    whitening = Whitening.fit(embeddings)
    assert whitening.project(embeddings).isfinite().all()
    variances = 1 / whitening.projection.square().sum(dim=0)
    assert (variances[-1] / variances[0]).item() == pytest.approx(1e-10)
    close(covariance(whitening.project(embeddings)), torch.diag(torch.tensor([1.0, 1, 1, 1, 0])), 1e-9)


def test_floor_is_a_share_of_the_largest_eigenvalue():
    variances = 1 / Whitening.fit(FIVE, floor=0.25).projection.square().sum(dim=0)
    close(variances, [0.233519, 0.079258, 0.25 * 0.233519], 1e-6)
    variances = 1 / Whitening.fit(FIVE, floor=0.5).projection.square().sum(dim=0)
    close(variances, [0.233519, 0.5 * 0.233519, 0.5 * 0.233519], 1e-6)


def test_a_dimension_keeps_the_directions_of_the_largest_variance():
    whole, part = Whitening.fit(pooled(50, 6)), Whitening.fit(pooled(50, 6), dimension=3)
    assert part.projection.shape == (7, 3)
    close(part.projection, whole.projection[:, :3], 0)
    close(part.mean, whole.mean, 0)
    assert part.transform(pooled(9, 6, seed=1)).shape == (9, 3)


def test_fewer_embeddings_than_channels_do_for_a_small_dimension():
    embeddings = pooled(5, 20)
    z = Whitening.fit(embeddings, dimension=4).project(embeddings)
    close(covariance(z), torch.eye(4), 1e-9)


def same_geometry(one, other, embeddings):
    """Equal up to the signs of the directions."""
    close(one.mean, other.mean, 1e-12)
    a, b = one.project(embeddings), other.project(embeddings)
    close(a @ a.T, b @ b.T, 1e-7)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_neither_the_chunks_nor_their_order_matter(sizes, random):
    sizes = [*sizes, 20]
    embeddings = pooled(sum(sizes), 4, seed=sum(sizes))
    chunks = list(embeddings.split(sizes))
    random.shuffle(chunks)
    same_geometry(Whitening.fit(embeddings), Whitening.fit(iter(chunks)), embeddings)


def test_more_rows_than_are_taken_at_a_time():
    embeddings = pooled(5000, 3)
    whitening = Whitening.fit(embeddings)
    close(covariance(whitening.project(embeddings)), torch.eye(4), 1e-9)
    same_geometry(whitening, Whitening.fit(embeddings.flip(0).split(999)), embeddings[:50])


@pytest.mark.parametrize("stripe", [1, 3, 5, 7])
def test_the_scatter_is_computed_in_stripes(monkeypatch, stripe):
    embeddings = pooled(80, 6)
    monkeypatch.setattr(whitening, "ROWS", 30)
    monkeypatch.setattr(whitening, "STRIPE", stripe)
    close(covariance(Whitening.fit(embeddings).project(embeddings)), torch.eye(7), 1e-10)


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_a_permutation_of_channels_changes_no_distance(seed):
    embeddings = pooled(40, 5, seed=seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    one, other = Whitening.fit(embeddings), Whitening.fit(embeddings[:, order])
    a, b = one.transform(embeddings), other.transform(embeddings[:, order])
    close(a @ a.T, b @ b.T, 1e-8)


def test_the_length_of_an_embedding_is_seen():
    # Without the constant channel these would be one point each.
    whitening = Whitening.fit(pooled(60, 4))
    short, long = whitening.transform(torch.stack([torch.ones(4), 3 * torch.ones(4)]).double())
    assert (short @ long).item() < 0.99


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_descriptors_have_unit_norm_and_the_type_of_the_embeddings(dtype):
    whitening = Whitening.fit(pooled(60, 4))
    embeddings = pooled(20, 4, seed=1).to(dtype)
    descriptors, projected = whitening.transform(embeddings), whitening.project(embeddings)
    assert (descriptors.dtype, projected.dtype) == (dtype, dtype)
    close(descriptors.double().norm(dim=1), torch.ones(20), 1e-5 + torch.finfo(dtype).eps)
    z = whitening.project(embeddings.double())
    expected = z / (z.norm(dim=1, keepdim=True) + 1e-6)
    # Half a unit in the last place: rounded once, at the end.
    torch.testing.assert_close(descriptors.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-12)


def test_no_embeddings_have_no_descriptors():
    assert Whitening.fit(FIVE).transform(torch.empty(0, 2)).shape == (0, 3)


def test_it_is_stored_and_read_back(tmp_path):
    whitening = Whitening.fit(FIVE)
    safetensors.torch.save_file(whitening.state_dict(), tmp_path / "file")
    again = Whitening.from_state(safetensors.torch.load_file(tmp_path / "file"))
    assert torch.equal(again.transform(FIVE), whitening.transform(FIVE))


NAN, INFINITE = FIVE.clone(), FIVE.clone()
NAN[3, 1], INFINITE[4, 0] = math.nan, math.inf
BAD = {
    "as many as dimensions": (FIVE[:3], {}, "more embeddings than dimensions, got 3 for 3; give 4 or more"),
    "as many as the dimension asked for": (FIVE[:2], {"dimension": 2}, "got 2 for 2; give 3 or more"),
    "none": ([], {}, "needs embeddings, got none"),
    "empty chunks": ([FIVE[:0]], {}, "needs embeddings, got none"),
    "nan": (NAN, {}, "finite, got nan or inf in number 3"),
    "infinity in a later chunk": ([FIVE, INFINITE], {}, "finite, got nan or inf in number 9"),
    "all equal": (torch.ones(9, 2), {}, "embeddings that differ, got 9 equal ones"),
    "chunks of two networks": ([FIVE, torch.ones(2, 3)], {}, r"the shape \(n, 2\), got \(2, 3\)"),
    "one embedding without its axis": (torch.ones(9), {}, r"the shape \(n, C\), got \(9,\)"),
    "no dimension": (FIVE, {"dimension": 0}, r"\[1, C \+ 1\], got 0 of 3"),
    "too many dimensions": (FIVE, {"dimension": 4}, r"\[1, C \+ 1\], got 4 of 3"),
    "no floor": (FIVE, {"floor": 0.0}, r"in \(0, 1\], got 0.0"),
    "floor above the largest": (FIVE, {"floor": 1.5}, r"in \(0, 1\], got 1.5"),
}


@pytest.mark.parametrize(("embeddings", "arguments", "says"), BAD.values(), ids=BAD)
def test_what_cannot_be_whitened_is_refused(embeddings, arguments, says):
    with pytest.raises(ValueError, match=says):
        Whitening.fit(embeddings, **arguments)


def test_the_least_number_of_embeddings_is_enough():
    assert Whitening.fit(FIVE[:4]).projection.shape == (3, 3)

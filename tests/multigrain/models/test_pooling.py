import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multigrain.models.pooling import GeM, gem

STEPS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def gem_by_loop(values, p, eps=1e-6):
    return (sum(max(value, eps) ** p for value in values) / len(values)) ** (1 / p)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1, 2.5),
        (2, math.sqrt(7.5)),
        (3, 25 ** (1 / 3)),
        (4, 88.5**0.25),
        (10, 3.501656),
        (50, 3.890620),
        (100, 3.944931),
        (math.inf, 4),
    ],
)
def test_one_to_four_pool_to_the_generalised_mean(p, expected):
    assert gem(STEPS, p).item() == pytest.approx(expected, abs=2e-6)
    if p < math.inf:
        assert gem(STEPS, torch.tensor(float(p))).item() == pytest.approx(expected, abs=2e-6)


@given(
    st.lists(st.floats(-2, 50), min_size=1, max_size=12),
    st.floats(1, 20).filter(lambda p: p != 1),
    st.sampled_from([1e-6, 1e-2]),
)
@settings(deadline=None, max_examples=50)
def test_any_map_pools_to_the_loop_over_its_clamped_values(values, p, eps):
    x = torch.tensor(values, dtype=torch.float64).view(1, 1, -1)
    assert gem(x, p, eps).item() == pytest.approx(gem_by_loop(values, p, eps), rel=1e-9)


@given(st.lists(st.floats(0, 50), min_size=2, max_size=12), st.floats(1, 99), st.floats(0.1, 50))
@settings(deadline=None, max_examples=50)
def test_pooling_grows_with_p_from_the_mean_to_the_maximum(values, p, more):
    x = torch.tensor(values, dtype=torch.float64).clamp(min=1e-6).view(1, -1)
    mean, low, high, peak = (gem(x, q).item() for q in (1, p, p + more, math.inf))
    slack = 1 + 1e-12
    assert mean <= low * slack
    assert low <= high * slack
    assert high <= peak * slack


def test_p_1_as_a_number_is_the_plain_mean_and_as_a_parameter_the_clamped_one():
    x = torch.tensor([[-1.0, 0.0], [2.0, 3.0]])
    assert gem(x, 1).item() == 1.0
    assert gem(x, 1.0).item() == 1.0
    assert gem(x, torch.tensor(1.0)).item() == pytest.approx(1.25, abs=1e-6)
    assert gem(x, 3).item() == pytest.approx(2.060643, abs=1e-6)


def test_an_empty_map_pools_to_the_floor_and_with_p_1_to_zero():
    nothing = torch.zeros(2, 2)
    assert gem(nothing, 3).item() == pytest.approx(1e-6)
    assert gem(nothing, 3, eps=1e-3).item() == pytest.approx(1e-3)
    assert gem(nothing, 1).item() == 0


def test_p_infinity_is_the_maximum_without_the_clamp():
    assert gem(torch.tensor([[-3.0, -1.0], [-2.0, -5.0]]), math.inf).item() == -1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [1, 3, 10, 100])
def test_half_precision_maps_neither_overflow_nor_underflow(dtype, p):
    # 50^3 and 0.003^3 lie outside fp16.
    for scale in (50, 0.003):
        x = (torch.rand(20, 3, 3, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
        pooled = gem(x, p)
        assert pooled.dtype == torch.float32
        expected = [gem_by_loop(values, p) for values in x.double().flatten(1).tolist()]
        assert pooled.tolist() == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize("p", [1, 3, 100, math.inf])
def test_maps_in_double_precision_stay_so(p):
    assert gem(STEPS.double(), p).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("value", "p"), [(50.0, 3.0), (4.0, 100.0), (60000.0, 100.0), (0.003, 100.0)])
def test_gradients_of_a_level_map_are_an_even_share_in_every_precision(dtype, value, p):
    x = torch.full((1, 2, 3, 4), value, dtype=dtype, requires_grad=True)
    pool = GeM(p, learnable=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        pooled = pool(x)
    assert pooled.dtype == torch.float32
    assert torch.allclose(pooled, x[..., 0, 0].float(), rtol=1e-6)
    pooled.sum().backward()
    assert x.grad.flatten().tolist() == pytest.approx([1 / 12] * 24, rel=torch.finfo(dtype).eps * 10)
    # A mean of equal values is their value, whatever the exponent.
    assert pool.p.grad.item() == pytest.approx(0, abs=1e-5 * value)


def test_gradients_have_the_figures_of_the_closed_form():
    x = STEPS.clone().requires_grad_()
    p = torch.tensor(3.0, requires_grad=True)
    gem(x, p).backward()
    assert p.grad.item() == pytest.approx(0.162134, abs=2e-6)
    assert x.grad.flatten().tolist() == pytest.approx([0.029240, 0.116961, 0.263162, 0.467843], abs=2e-6)


@pytest.mark.parametrize("p", [1.0, 1.7, 3.0, 8.0])
def test_gradients_agree_with_finite_differences(p):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 2, 4, generator=generator, dtype=torch.float64) + 0.1
    exponent = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gem, (x.requires_grad_(), exponent))
    assert torch.autograd.gradcheck(lambda maps: gem(maps, p), (x,))


def test_gradients_are_finite_where_the_power_of_the_ratio_underflows():
    x = torch.tensor([[0.0, 1e-6], [1.0, 4.0]], requires_grad=True)
    p = torch.tensor(100.0, requires_grad=True)
    gem(x, p).backward()
    assert x.grad.isfinite().all()
    # For a single peak v among n: d/dp of v n^(-1/p) = v n^(-1/p) ln(n) / p^2.
    assert p.grad.item() == pytest.approx(4 * 4**-0.01 * math.log(4) / 100**2, rel=1e-5)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("p", [1, 3, 100, math.inf])
def test_leading_axes_are_kept_and_pooled_one_by_one(leading, p):
    x = torch.rand(*leading, 2, 5, generator=torch.Generator().manual_seed(1))
    # A dim map next to a bright one: (1e-3)^100 lies far below fp32.
    maps = x.view(-1, 2, 5)
    maps *= torch.logspace(0, -3, len(maps)).view(-1, 1, 1)
    pooled = gem(x, p)
    assert pooled.shape == leading
    for one_map, one in zip(maps, pooled.view(-1), strict=True):
        assert one.item() == pytest.approx(gem(one_map, p).item(), rel=1e-6)


def test_the_module_pools_with_the_p_that_it_was_given():
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    assert torch.equal(GeM(2.5)(x), gem(x, 2.5))
    assert torch.equal(GeM()(x), gem(x, 3.0))
    assert not list(GeM(3.0).parameters())


def test_a_learnable_p_is_a_parameter_that_follows_its_gradient():
    pool = GeM(3.0, learnable=True)
    assert [parameter.item() for parameter in pool.parameters()] == [3.0]
    assert list(pool.state_dict()) == ["p"]
    optimizer = torch.optim.SGD(pool.parameters(), lr=1.0)
    pool(STEPS).backward()
    optimizer.step()
    assert pool.p.item() == pytest.approx(3 - 0.162134, abs=2e-6)
    assert pool(STEPS).item() < 25 ** (1 / 3)


def test_a_learnable_p_counts_as_1_below_1():
    pool = GeM(1.0, learnable=True)
    at_one = pool(STEPS - 3).item()
    with torch.no_grad():
        pool.p.fill_(0.4)
    # (1e-6 + 1e-6 + 1e-6 + 1) / 4
    assert pool(STEPS - 3).item() == at_one == pytest.approx(0.25, abs=2e-6)


@pytest.mark.parametrize(("p", "sign", "moves"), [(1.0, 1, True), (0.9, 1, False), (0.9, -1, True), (1.1, 1, True)])
def test_a_learnable_p_below_1_can_only_rise(p, sign, moves):
    pool = GeM(p, learnable=True)
    (sign * pool(STEPS)).sum().backward()
    # The mean grows with p: to make it smaller is to lower p.
    assert (pool.p.grad.item() * sign > 0) == moves
    assert pool.p.grad.isfinite()
    if p < 1 and moves:
        x = STEPS.double()
        exponent = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        gem(x, exponent).backward()
        assert pool.p.grad.item() == pytest.approx(-exponent.grad.item(), rel=1e-5)

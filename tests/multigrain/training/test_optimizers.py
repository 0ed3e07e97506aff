import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from multigrain.config.training import OptimizerSettings
from multigrain.models.pooling import GeM
from multigrain.training.optimizers import build_optimizers, rate_factor, set_rates


def step_schedule(**settings):
    return OptimizerSettings(**settings)


def cosine(**settings):
    return OptimizerSettings(schedule="cosine", **settings)


def boundary(value=1.2):
    return nn.Parameter(torch.tensor(value))


def network():
    """A kernel, four vectors and an exponent."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4), GeM(3.0, learnable=True), nn.Linear(4, 2))


def rates(optimizers):
    return [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]


def test_the_step_schedule_drops_at_30_60_and_90_of_120_epochs():
    factors = [0.2 * rate_factor(epoch, 120, step_schedule()) for epoch in range(120)]
    assert factors == pytest.approx([0.2] * 30 + [0.02] * 30 + [0.002] * 30 + [0.0002] * 30)


@given(st.integers(0, 119), st.floats(0, 1, exclude_max=True))
def test_the_step_schedule_stands_still_within_an_epoch(epoch, part):
    progress = min(epoch + part, math.nextafter(epoch + 1, 0))
    assert rate_factor(progress, 120, step_schedule()) == rate_factor(epoch, 120, step_schedule())


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(1, [1]), (2, [1, 0.01]), (4, [1, 0.1, 0.01, 0.001]), (6, [1, 1, 0.1, 0.01, 0.01, 0.001])],
)
def test_the_step_schedule_drops_in_the_first_epoch_past_each_quarter(epochs, expected):
    factors = [rate_factor(epoch + part, epochs, step_schedule()) for epoch in range(epochs) for part in (0, 0.99)]
    assert factors == pytest.approx([factor for factor in expected for _ in range(2)])


def test_the_cosine_schedule_falls_from_1_to_0():
    half_root = math.sqrt(0.5)
    expected = [1, (1 + half_root) / 2, 0.5, (1 - half_root) / 2, 0]
    assert [rate_factor(epoch, 4, cosine()) for epoch in range(5)] == pytest.approx(expected, abs=1e-12)
    # Within an epoch, too.
    assert rate_factor(1 / 3, 1, cosine()) == pytest.approx(0.75)


@given(st.floats(0, 120), st.floats(0, 120))
def test_the_cosine_schedule_falls_steadily_and_without_jumps(one, other):
    early, late = sorted((one, other))
    fall = rate_factor(early, 120, cosine()) - rate_factor(late, 120, cosine())
    # The steepest slope, half way, is pi / 2 over all epochs.
    assert -1e-12 <= fall <= (late - early) * math.pi / 240 + 1e-12


@pytest.mark.parametrize("settings", [step_schedule, cosine])
@given(progress=st.floats(0, 40, exclude_max=True))
def test_the_rates_climb_linearly_from_0_while_they_warm_up(settings, progress):
    plain, warm = (rate_factor(progress, 40, settings(warmup=warmup)) for warmup in (0.0, 12.5))
    # The drop after 10 epochs falls into the warm-up and is not put off.
    assert warm == pytest.approx(plain * min(1, progress / 12.5), abs=1e-12)


def test_a_warm_up_of_half_an_epoch_is_worked_out():
    factors = [rate_factor(progress, 4, step_schedule(warmup=0.5)) for progress in (0, 0.125, 0.25, 0.5, 0.75, 1)]
    assert factors == pytest.approx([0, 0.25, 0.5, 1, 1, 0.1])


@pytest.mark.parametrize(
    ("batch_size", "rate", "beta_rate"),
    [(512, 0.2, 0.1), (256, 0.1, 0.05), (1536, 0.6, 0.3), (504, 0.196875, 0.0984375)],
)
def test_rates_grow_linearly_with_the_views_in_a_step(batch_size, rate, beta_rate):
    optimizers = build_optimizers(OptimizerSettings(), network(), boundary(), batch_size)
    assert rates(optimizers) == [pytest.approx([rate] * 2), pytest.approx([beta_rate])]


def decay_of(optimizer):
    """Weight decay by the shape of the parameter."""
    return {
        tuple(parameter.shape): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
@pytest.mark.parametrize("decay_all", [True, False])
def test_kernels_decay_vectors_if_asked_and_an_exponent_never(algorithm, decay_all):
    settings = OptimizerSettings(algorithm=algorithm, rate=0.01, weight_decay=0.05, decay_all=decay_all)
    net, beta = network(), boundary()
    main, own = build_optimizers(settings, net, beta, 512)
    vector = 0.05 if decay_all else 0.0
    assert decay_of(main) == {(4, 3, 2, 2): 0.05, (4,): vector, (2, 4): 0.05, (2,): vector, (): 0.0}
    # Each parameter once, and beta by itself.
    listed = [id(parameter) for group in main.param_groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in net.parameters())
    assert [[id(parameter) for parameter in group["params"]] for group in own.param_groups] == [[id(beta)]]
    assert decay_of(own) == {(): 0.0}


def test_the_algorithms_get_their_settings_and_beta_always_has_sgd():
    settings = OptimizerSettings(rate=0.4, beta_rate=0.3, momentum=0.8)
    main, own = build_optimizers(settings, network(), boundary(), 512)
    assert [type(main), type(own)] == [torch.optim.SGD, torch.optim.SGD]
    assert {(group["lr"], group["momentum"]) for group in main.param_groups} == {(0.4, 0.8)}
    assert [(group["lr"], group["momentum"]) for group in own.param_groups] == [(0.3, 0.8)]

    settings = OptimizerSettings(algorithm="adamw", rate=0.004, beta_rate=0.3, momentum=0.8)
    main, own = build_optimizers(settings, network(), boundary(), 256)
    assert [type(main), type(own)] == [torch.optim.AdamW, torch.optim.SGD]
    assert {(group["lr"], group["betas"]) for group in main.param_groups} == {(0.002, (0.8, 0.999))}
    assert [(group["lr"], group["momentum"]) for group in own.param_groups] == [(0.15, 0.8)]


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_a_step_without_a_gradient_shrinks_what_decays_alone(algorithm):
    settings = OptimizerSettings(algorithm=algorithm, rate=0.05, weight_decay=0.1)
    net, beta = network(), boundary()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    for parameter in (*net.parameters(), beta):
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in build_optimizers(settings, net, beta, 512):
        optimizer.step()
    for old, new in zip(before, net.parameters(), strict=True):
        factor = 1 if old.ndim == 0 else 1 - 0.05 * 0.1
        assert torch.allclose(new, old * factor, rtol=1e-6)
    assert beta.item() == pytest.approx(1.2)


def test_beta_steps_against_its_gradient_with_momentum():
    beta = boundary()
    _, own = build_optimizers(OptimizerSettings(beta_rate=0.2), network(), beta, 512)
    # Half of the margin loss's gradient of 0.2; the second velocity is 0.9 * 0.1 + 0.1 = 0.19.
    for expected in (1.18, 1.18 - 0.2 * 0.19):
        beta.grad = torch.tensor(0.1)
        own.step()
        assert beta.item() == pytest.approx(expected)


def test_set_rates_scales_the_base_rates_whatever_they_were_before():
    optimizers = build_optimizers(OptimizerSettings(), network(), boundary(), 256)
    for factor in (0.0, 1e-3, 1e-3, 0.5, 1.0):
        set_rates(optimizers, factor)
        assert rates(optimizers) == [pytest.approx([0.1 * factor] * 2), pytest.approx([0.05 * factor])]


def test_base_rates_outlive_a_state_dict_taken_at_a_lower_rate():
    late, fresh = (build_optimizers(OptimizerSettings(), network(), boundary(), 512) for _ in range(2))
    set_rates(late, 1e-3)
    for one, other in zip(fresh, late, strict=True):
        one.load_state_dict(other.state_dict())
    assert rates(fresh) == [pytest.approx([2e-4] * 2), pytest.approx([1e-4])]
    set_rates(fresh, 1.0)
    assert rates(fresh) == [pytest.approx([0.2] * 2), pytest.approx([0.1])]


def test_a_network_of_kernels_alone_has_one_group():
    net = nn.Conv2d(3, 4, 2, bias=False)
    assert len(build_optimizers(OptimizerSettings(), net, boundary(), 512)[0].param_groups) == 1

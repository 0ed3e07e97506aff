import math

import pytest
import torch
from torch import nn

from multigrain.optim import build_optimizer, rate_factor, set_epoch
from multigrain.spec import OptimizerSettings


def parameters(*values):
    return [nn.Parameter(torch.tensor(float(value))) for value in values]


def test_the_step_schedule_drops_at_30_60_and_90_of_120_epochs():
    factors = [rate_factor(epoch, 120, "step") for epoch in range(120)]
    assert factors == pytest.approx([1] * 30 + [0.1] * 30 + [0.01] * 30 + [0.001] * 30)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(1, [1]), (2, [1, 0.01]), (4, [1, 0.1, 0.01, 0.001]), (6, [1, 1, 0.1, 0.01, 0.01, 0.001])],
)
def test_the_step_schedule_drops_in_the_first_epoch_past_each_quarter(epochs, expected):
    assert [rate_factor(epoch, epochs, "step") for epoch in range(epochs)] == pytest.approx(expected)


def test_the_cosine_schedule_falls_from_1_to_0():
    half_root = math.sqrt(0.5)
    expected = [1, (1 + half_root) / 2, 0.5, (1 - half_root) / 2, 0]
    assert [rate_factor(epoch, 4, "cosine") for epoch in range(5)] == pytest.approx(expected, abs=1e-12)
    course = [rate_factor(epoch, 120, "cosine") for epoch in range(121)]
    assert course == sorted(course, reverse=True)


@pytest.mark.parametrize(("batch_size", "rate", "beta_rate"), [(512, 0.2, 0.1), (256, 0.1, 0.05), (1536, 0.6, 0.3)])
def test_rates_grow_linearly_with_the_views_in_a_step(batch_size, rate, beta_rate):
    network, beta = parameters(1, 2), *parameters(1.2)
    optimizer = build_optimizer(OptimizerSettings(), network, beta, batch_size)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, beta_rate])


def test_beta_has_a_group_of_its_own_without_decay():
    network, (beta,) = parameters(1, 2), parameters(1.2)
    settings = OptimizerSettings(rate=0.4, beta_rate=0.3, momentum=0.8, weight_decay=0.01)
    trunk, boundary = build_optimizer(settings, iter(network), beta, 512).param_groups
    assert [id(parameter) for parameter in trunk["params"]] == [id(parameter) for parameter in network]
    assert [id(parameter) for parameter in boundary["params"]] == [id(beta)]
    assert [(group["lr"], group["weight_decay"], group["momentum"]) for group in (trunk, boundary)] == [
        (0.4, 0.01, 0.8),
        (0.3, 0.0, 0.8),
    ]


def test_a_step_without_a_gradient_shrinks_the_network_but_not_beta():
    (weight,), (beta,) = parameters(2), parameters(1.2)
    optimizer = build_optimizer(OptimizerSettings(rate=0.5, weight_decay=0.1), [weight], beta, 512)
    weight.grad, beta.grad = torch.zeros(()), torch.zeros(())
    optimizer.step()
    # 2 - 0.5 * 0.1 * 2
    assert weight.item() == pytest.approx(1.9)
    assert beta.item() == pytest.approx(1.2)


def test_beta_steps_against_its_gradient_with_momentum():
    (beta,) = parameters(1.2)
    optimizer = build_optimizer(OptimizerSettings(beta_rate=0.2), parameters(1), beta, 512)
    # Half of the margin loss's gradient of 0.2; the second velocity is 0.9 * 0.1 + 0.1 = 0.19.
    for expected in (1.18, 1.18 - 0.2 * 0.19):
        beta.grad = torch.tensor(0.1)
        optimizer.step()
        assert beta.item() == pytest.approx(expected)


def test_set_epoch_scales_the_base_rates_whatever_the_epoch_before():
    optimizer = build_optimizer(OptimizerSettings(), parameters(1), *parameters(1.2), 256)
    for epoch, factor in [(0, 1), (95, 1e-3), (95, 1e-3), (31, 0.1), (60, 1e-2), (29, 1)]:
        set_epoch(optimizer, epoch, 120, "step")
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.05 * factor])
    set_epoch(optimizer, 60, 120, "cosine")
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.025])


def test_base_rates_outlive_a_state_dict_taken_at_a_lower_rate():
    late = build_optimizer(OptimizerSettings(), parameters(1), *parameters(1.2), 512)
    set_epoch(late, 100, 120, "step")
    fresh = build_optimizer(OptimizerSettings(), parameters(1), *parameters(1.2), 512)
    fresh.load_state_dict(late.state_dict())
    assert [group["lr"] for group in fresh.param_groups] == pytest.approx([2e-4, 1e-4])
    set_epoch(fresh, 0, 120, "step")
    assert [group["lr"] for group in fresh.param_groups] == pytest.approx([0.2, 0.1])

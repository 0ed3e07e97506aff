"""Optimizers of the network and of beta, and the schedule of their learning rates."""

import math
from collections.abc import Sequence

from torch import Tensor, nn, optim
from torch.optim.swa_utils import get_ema_multi_avg_fn

from multigrain.config.training import OptimizerSettings

REFERENCE_BATCH = 512
"""Number of views in a step for which the learning rates of the settings hold."""


def rate_factor(progress: float, epochs: int, settings: OptimizerSettings) -> float:
    """Factor of the learning rates after `progress` epochs, in [0, epochs)."""
    warm = min(1.0, progress / settings.warmup) if settings.warmup else 1.0
    if settings.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * progress / epochs))
    return warm * 0.1 ** sum(int(progress) >= share * epochs for share in (0.25, 0.5, 0.75))


def build_optimizers(
    settings: OptimizerSettings, network: nn.Module, beta: nn.Parameter, batch_size: int
) -> list[optim.Optimizer]:
    """Build the optimizer of the network, and SGD for beta.

    Learning rates are proportional to `batch_size`, the number of views in a step over all ranks. Weight decay applies
    to kernels and, with `decay_all`, to scales, shifts and biases; never to a learnable exponent p, a single number.
    """
    scale = batch_size / REFERENCE_BATCH
    smallest = 1 if settings.decay_all else 2
    decaying: list[Tensor] = [parameter for parameter in network.parameters() if parameter.ndim >= smallest]
    free: list[Tensor] = [parameter for parameter in network.parameters() if parameter.ndim < smallest]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decaying, settings.weight_decay), (free, 0.0))
        if parameters
    ]
    rate = settings.rate * scale
    main: optim.Optimizer
    if settings.algorithm == "adamw":
        main = optim.AdamW(groups, lr=rate, betas=(settings.momentum, 0.999))
    else:
        main = optim.SGD(groups, lr=rate, momentum=settings.momentum)
    optimizers: list[optim.Optimizer] = [
        main,
        optim.SGD([beta], lr=settings.beta_rate * scale, momentum=settings.momentum),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_rate"] = group["lr"]
    return optimizers


def set_rates(optimizers: Sequence[optim.Optimizer], factor: float) -> None:
    """Set all learning rates to `factor` times their base rates."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_rate"] * factor


def update_average(averaged: nn.Module, network: nn.Module, decay: float, steps: int) -> None:
    """Move averaged weights towards those of the network by 1 - decay, and copy the network's statistics.

    At the start they move by 1 - (1 + steps) / (10 + steps), which is more, so that random weights fade soon.
    """
    update = get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))  # type: ignore[no-untyped-call]
    update([*averaged.parameters()], [*network.parameters()], 0)
    for mean, buffer in zip(averaged.buffers(), network.buffers(), strict=True):
        mean.copy_(buffer)

"""SGD with the paper's schedule: one group for the network, one for beta."""

import math
from collections.abc import Iterable

from torch import Tensor, nn, optim

from multigrain.spec import OptimizerSettings

REFERENCE_BATCH = 512
"""Views in a step for which the settings' rates hold."""


def rate_factor(epoch: int, epochs: int, schedule: str) -> float:
    """What the learning rates are multiplied with in `epoch`, counted from 0."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return 0.1 ** sum(epoch >= share * epochs for share in (0.25, 0.5, 0.75))


def build_optimizer(
    settings: OptimizerSettings, network: Iterable[nn.Parameter], beta: nn.Parameter, batch_size: int
) -> optim.SGD:
    """SGD whose rates grow linearly with the views in one step over all ranks."""
    scale = batch_size / REFERENCE_BATCH
    groups: list[dict[str, list[Tensor] | float]] = [
        {"params": list(network), "lr": settings.rate * scale, "weight_decay": settings.weight_decay},
        {"params": [beta], "lr": settings.beta_rate * scale, "weight_decay": 0.0},
    ]
    optimizer = optim.SGD(groups, momentum=settings.momentum)
    for group in optimizer.param_groups:
        group["base_rate"] = group["lr"]
    return optimizer


def set_epoch(optimizer: optim.SGD, epoch: int, epochs: int, schedule: str) -> None:
    """Set the rates of `epoch`, counted from 0, from the groups' base rates."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * rate_factor(epoch, epochs, schedule)

"""Joint loss of one rank's part of a step, and its gradient with respect to the embeddings.

The losses read embeddings that are detached from the network. So the gradients of the two losses can be told apart, and
a step can pass through the network in parts while its pairs come from the whole step.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn

from multigrain.config.training import MultiGrainSpec
from multigrain.distributed import mean_over_ranks, rank_and_size
from multigrain.losses.margin import MarginLoss, classification_loss, entropy_loss
from multigrain.losses.triplets import ALL, draw_triplets
from multigrain.models.multigrain import MultiGrain


class _Gather(torch.autograd.Function):
    """(B, C) on each rank -> (ranks x B, C) on all, in the order of the ranks; gradients are summed over ranks."""

    @staticmethod
    def forward(_: Any, mine: Tensor) -> Tensor:
        parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, mine.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


class Step(NamedTuple):
    """Labels and instances of a step, on the CPU."""

    labels: Tensor
    """(B,) class numbers of this rank's views."""
    instances: Tensor
    """(ranks x B,) instance ids of the views of all ranks, in the order of the ranks."""


class JointLoss(nn.Module):
    """lambda x cross-entropy + (1 - lambda) x margin loss (the paper's equation 5) of a network's embeddings.

    The mean over ranks of losses and gradients equals those of the whole step. With mixup, views are mixed with
    others of their rank only.
    """

    def __init__(self, network: MultiGrain, spec: MultiGrainSpec) -> None:
        super().__init__()
        self.network = network
        self.margin = MarginLoss(spec.loss.beta, spec.loss.margin, spec.loss.normalise)
        self.settings, self.mixup = spec.loss, spec.augment.mixup

    @property
    def head(self) -> list[nn.Parameter]:
        """Parameters whose gradients `backward` adds to: those of the classifier, and beta."""
        return [*self.network.classifier.parameters(), self.margin.beta]

    def backward(
        self, embeddings: Tensor, step: Step, generator: torch.Generator, scale: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of one rank's loss to `head`, and return the gradient of the embeddings.

        Args:
            embeddings: (B, C) of this rank.
            step: labels and instances.
            generator: for negatives and mixup; must be in the same state on all ranks.
            scale: factor of the gradients.
        Returns:
            The gradient (B, C), and scalars for the log: the losses; the sums of `MarginLoss`; `anchors`, and
            `fallback`, the number of anchors whose other images were all too far; `classification_gradient`, the share
            of cross-entropy in the gradient norms of the two weighted losses (paper Fig. 5).
        """
        weight = self.settings.weight
        leaf = embeddings.detach().requires_grad_()
        output = self.network.head(leaf)
        classification = self._classification(output.logits, step, generator)
        if weight > 0:
            torch.autograd.backward(weight * scale * classification)
        first = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
        margin, entropy, sums = self._pairs(output.descriptor, step, generator)
        rest = (1 - weight) * margin + self.settings.entropy * entropy
        torch.autograd.backward(scale * rest)
        assert leaf.grad is not None, "a loss was computed"
        norms = first.norm(), (leaf.grad - first).norm()
        share = norms[0] / (norms[0] + norms[1]).clamp(min=torch.finfo(leaf.dtype).tiny)
        values = {"loss": weight * classification + rest, "classification": classification, "margin": margin}
        values |= {"classification_gradient": share, **sums} | ({"entropy": entropy} if self.settings.entropy else {})
        return leaf.grad, {name: value.detach() for name, value in values.items()}

    def _classification(self, logits: Tensor, step: Step, generator: torch.Generator) -> Tensor:
        labels = step.labels.to(logits.device, non_blocking=True)
        if not self.mixup:
            return classification_loss(logits, labels)
        rng = np.random.default_rng(generator.initial_seed())  # on the CPU, which needs the share
        order = torch.from_numpy(rng.permutation(len(labels))).to(labels.device, non_blocking=True)
        return classification_loss(logits, labels, order, rng.beta(self.mixup, self.mixup))

    def _pairs(
        self, descriptors: Tensor, step: Step, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Margin loss and entropy loss of this rank's anchors, and sums for the log."""
        settings, own, (rank, size) = self.settings, len(descriptors), rank_and_size()
        rows, instances = slice(rank * own, (rank + 1) * own), step.instances
        if settings.negatives_from == "rank":
            rows, instances = ALL, instances[rows]
        elif distributed.is_initialized():
            descriptors = _Gather.apply(descriptors)
        triplets, fallback = draw_triplets(
            descriptors,
            instances,
            settings.negatives,
            generator,
            settings.cutoff,
            settings.nonzero_loss_cutoff,
            settings.dimension,
            rows,
        )
        margin, sums = self.margin(descriptors, triplets, mean_over_ranks if size > 1 else None)
        entropy = entropy_loss(descriptors, instances, rows) if settings.entropy else torch.zeros_like(margin)
        return margin, entropy, {**sums, "anchors": torch.full_like(margin, own), "fallback": fallback[0]}

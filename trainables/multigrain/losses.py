"""What the pairs cost: margin loss with a learnable boundary, and its mix with cross-entropy.

The paper's equation 5; the margin loss is that of Wu et al.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from multigrain.sampling import Triplets

Reduce = Callable[[Tensor], Tensor]
"""Averages a tensor over all ranks; the identity on one."""


def alone(x: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return x


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise Euclidean distance of two (P, C) tensors, (P,); the 1e-8 keeps its gradient finite at 0."""
    return ((a - b).square().sum(dim=1) + 1e-8).sqrt()


def margin_terms(d_ap: Tensor, d_an: Tensor, beta: Tensor, margin: float) -> Tensor:
    """[d_ap - beta + margin]+ and [beta - d_an + margin]+ of P triplets, (2P,)."""
    return torch.cat([d_ap - beta + margin, beta - d_an + margin]).clamp(min=0)


def margin_loss(d_ap: Tensor, d_an: Tensor, beta: Tensor, margin: float = 0.2, average: Reduce = alone) -> Tensor:
    """Mean of the active margin terms, those above zero; 0 if there is none.

    Positive and negative terms count one by one, as in Wu et al.; a count of triplets, or of all
    pairs, would give another loss. Averaged over ranks, the results are the loss of the whole batch.

    Args:
        d_ap: (P,) distances of copies of one image.
        d_an: (P,) distances of views of different images.
        beta: the boundary, a tensor of one element; differentiated through.
        margin: alpha, in units of distance.
        average: averages the number of active terms over ranks.
    """
    return _active_mean(margin_terms(d_ap, d_an, beta, margin), average)


def _active_mean(terms: Tensor, average: Reduce) -> Tensor:
    active = average((terms > 0).sum().to(terms.dtype))
    return terms.sum() / torch.where(active > 0, active, 1)


class MarginLoss(nn.Module):
    """`margin_loss` of sampled triplets, with the learnable boundary beta (paper Table B.1)."""

    def __init__(self, beta: float = 1.2, margin: float = 0.2) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(float(beta)))
        self.margin = margin

    def forward(
        self, descriptors: Tensor, triplets: Triplets, average: Reduce = alone
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            descriptors: (B, C) of unit norm.
            triplets: indices into the batch.
            average: averages over ranks.
        Returns:
            The loss, and for the log the sums over triplets: `triplets` (their number), `active` (terms
            above zero, at most two a triplet), `positive_distance`, `negative_distance`.
        """
        d_ap = distance(descriptors[triplets.anchors], descriptors[triplets.positives])
        d_an = distance(descriptors[triplets.anchors], descriptors[triplets.negatives])
        terms = margin_terms(d_ap, d_an, self.beta, self.margin)
        sums = {
            "triplets": d_ap.new_tensor(len(d_ap)),
            "active": (terms > 0).sum().to(d_ap.dtype),
            "positive_distance": d_ap.detach().sum(),
            "negative_distance": d_an.detach().sum(),
        }
        return _active_mean(terms, average), sums


class JointLoss(NamedTuple):
    """The loss of one batch and its two parts."""

    loss: Tensor
    classification: Tensor
    margin: Tensor


def joint_loss(logits: Tensor, labels: Tensor, margin: Tensor, weight: float) -> JointLoss:
    """lambda * cross-entropy + (1 - lambda) * margin loss, the paper's equation 5.

    Args:
        logits: (B, K).
        labels: (B,) class numbers.
        margin: the margin loss of the same batch, one element.
        weight: lambda, in [0, 1].
    """
    classification = functional.cross_entropy(logits, labels)
    return JointLoss(weight * classification + (1 - weight) * margin, classification, margin)

"""Loss functions: margin loss with a learnable boundary (Wu et al., 2017), cross-entropy with mixup, entropy loss."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from multigrain.losses.triplets import Triplets

Average = Callable[[Tensor], Tensor]
"""Averages a tensor over all ranks."""

Normalisation = Literal["active", "triplets", "pairs"]


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (P,) between the rows of two (P, C) tensors; the 1e-8 keeps the gradient finite at 0."""
    return ((a - b).square().sum(dim=1) + 1e-8).sqrt()


def margin_terms(d_ap: Tensor, d_an: Tensor, beta: Tensor, margin: float) -> Tensor:
    """Terms [d_ap - beta + margin]+ and [beta - d_an + margin]+ of P triplets, (2, P)."""
    return torch.stack([d_ap - beta + margin, beta - d_an + margin]).clamp(min=0)


def margin_loss(
    d_ap: Tensor,
    d_an: Tensor,
    beta: Tensor,
    margin: float = 0.2,
    normalise: Normalisation = "active",
    average: Average | None = None,
) -> Tensor:
    """Sum of the margin terms of P triplets, divided by a count; 0 if the count is 0.

    Args:
        d_ap: (P,) distances between copies of one image.
        d_an: (P,) distances between views of different images.
        beta: boundary between the two, a tensor of one element; receives a gradient.
        margin: alpha, in units of distance.
        normalise: the count. `active`: terms above zero (Wu et al.); `triplets`: triplets with a term above zero (the
            released code on torch 1.2 and newer); `pairs`: all terms (the paper's equation 5).
        average: averages the count over ranks, so that the mean of the ranks' losses is the loss of the whole batch.
    """
    return _normalised(margin_terms(d_ap, d_an, beta, margin), normalise, average)


def _normalised(terms: Tensor, normalise: Normalisation, average: Average | None) -> Tensor:
    active = terms > 0
    if normalise == "pairs":
        active = torch.ones_like(active)
    count = (active.any(dim=0).sum() if normalise == "triplets" else active.sum()).to(terms.dtype)
    if average:
        count = average(count)
    return terms.sum() / torch.where(count > 0, count, 1)


class MarginLoss(nn.Module):
    """`margin_loss` of sampled triplets, with the learnable boundary `beta` (paper Table B.1)."""

    def __init__(self, beta: float = 1.2, margin: float = 0.2, normalise: Normalisation = "active") -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(float(beta)))
        self.margin, self.normalise = margin, normalise

    def forward(
        self, descriptors: Tensor, triplets: Triplets, average: Average | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            descriptors: (B, C) of unit norm.
            triplets: indices into the batch.
            average: as in `margin_loss`.
        Returns:
            The loss, and sums over the triplets for the log: `triplets` (their number), `active` (terms above zero, at
            most two for each triplet), `positive_distance`, `negative_distance`.
        """
        d_ap = distance(descriptors[triplets.anchors], descriptors[triplets.positives])
        d_an = distance(descriptors[triplets.anchors], descriptors[triplets.negatives])
        terms = margin_terms(d_ap, d_an, self.beta, self.margin)
        sums = {
            "triplets": torch.ones_like(d_ap).sum(),
            "active": (terms > 0).sum().to(d_ap.dtype),
            "positive_distance": d_ap.detach().sum(),
            "negative_distance": d_an.detach().sum(),
        }
        return _normalised(terms, self.normalise, average), sums


def entropy_loss(descriptors: Tensor, instance_ids: Tensor, rows: slice = slice(None)) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest view of another image; lower is more evenly spread.

    This is the Kozachenko-Leonenko estimate of the descriptors' entropy, used for copy detection by SSCD (Pizzi et
    al., 2022). It is 0 if the batch holds no other image.

    Args:
        descriptors: (B, C) of unit norm.
        instance_ids: (B,) integers; views with the same id show the same image.
        rows: the views over which the mean is taken.
    """
    ids = instance_ids.to(descriptors.device, non_blocking=True)
    different = ids[rows, None] != ids[None, :]
    with torch.no_grad():
        cosines = (descriptors[rows] @ descriptors.T).masked_fill(~different, -torch.inf)
        nearest = cosines.argmax(dim=1)
    logs = distance(descriptors[rows], descriptors[nearest]).log()
    return -torch.where(different.any(dim=1), logs, 0).mean()


def classification_loss(logits: Tensor, labels: Tensor, mixed_with: Tensor | None = None, share: float = 1.0) -> Tensor:
    """Mean cross-entropy of a batch, optionally with mixup of the embeddings.

    The classifier is linear: mixing its outputs equals mixing the embeddings that it reads.

    Args:
        logits: (B, K).
        labels: (B,) class numbers.
        mixed_with: (B,) index of the row that each row is mixed with.
        share: share of the row itself in the mixture, in [0, 1].
    """
    if mixed_with is None:
        return functional.cross_entropy(logits, labels)
    mixed = share * logits + (1 - share) * logits[mixed_with]
    own, other = (functional.cross_entropy(mixed, target) for target in (labels, labels[mixed_with]))
    return share * own + (1 - share) * other

"""Which pairs the margin loss compares: every pair of copies, and a sampled negative for each.

The distribution is that of Wu et al., "Sampling matters in deep embedding learning".
Shape legend: B views in the batch, C channels, P ordered positive pairs.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

NegativeMode = Literal["distance_weighted", "uniform"]


class Triplets(NamedTuple):
    """Index tensors of shape (P',), P' <= P: anchor i, another copy of its image, a view of another image."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor


def pairwise_distances(descriptors: Tensor) -> Tensor:
    """Euclidean distances (B, B) of the rows of (B, C).

    Squares are clamped at 0: rounding makes those of duplicates negative.
    """
    squares_B = descriptors.square().sum(dim=1)
    squared_BB = squares_B[:, None] + squares_B[None, :] - 2 * descriptors @ descriptors.T
    return squared_BB.clamp(min=0).sqrt()


def negative_weights(
    descriptors: Tensor,
    instance_ids: Tensor,
    mode: NegativeMode = "distance_weighted",
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
) -> Tensor:
    """Probability (B, B) of drawing column j as the negative of row i.

    `distance_weighted`: w(d) = 1 / q(d), where q(d) = d^(C-2) (1 - d^2/4)^((C-3)/2) is the density of
    distances between random points of the sphere; d is raised to `cutoff` first, and views farther
    than `nonzero_loss_cutoff` get nothing. The weights are normalised row by row in log space after
    masking: at C = 2048 they span e^1484, and a maximum over the whole batch would leave no row anything.
    `uniform`: every view of another image alike. A row whose other images all lie beyond the cutoff
    is uniform too.

    Rows sum to 1, or to 0 where the batch holds no other image. No gradient flows back.

    Args:
        descriptors: (B, C) of unit norm.
        instance_ids: (B,) integers; views with the same id show the same image.
    """
    with torch.no_grad():
        different_BB = instance_ids[:, None] != instance_ids[None, :]
        if mode == "uniform":
            candidates_BB, log_weights_BB = different_BB, torch.zeros_like(different_BB, dtype=descriptors.dtype)
        else:
            channels = descriptors.shape[1]
            distances_BB = pairwise_distances(descriptors)
            d_BB = distances_BB.clamp(min=cutoff)
            # 1 - d^2/4 reaches 0 for opposite descriptors; they are beyond the cutoff, and must not yield NaN.
            sphere_BB = (1 - 0.25 * d_BB.square()).clamp(min=torch.finfo(d_BB.dtype).tiny)
            log_weights_BB = (2 - channels) * d_BB.log() - 0.5 * (channels - 3) * sphere_BB.log()
            near_BB = different_BB & (distances_BB < nonzero_loss_cutoff)
            fallback_B1 = ~near_BB.any(dim=1, keepdim=True)
            candidates_BB = torch.where(fallback_B1, different_BB, near_BB)
            log_weights_BB = log_weights_BB.masked_fill(fallback_B1, 0.0)
        weights_BB = log_weights_BB.masked_fill(~candidates_BB, float("-inf")).softmax(dim=1)
        return torch.where(different_BB.any(dim=1, keepdim=True), weights_BB, 0.0)


def sample_triplets(
    descriptors: Tensor,
    instance_ids: Tensor,
    mode: NegativeMode = "distance_weighted",
    generator: torch.Generator | None = None,
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
) -> Triplets:
    """All ordered pairs of copies, each with one negative drawn from `negative_weights`, independently.

    A group of m copies gives m (m - 1) triplets; an image without a copy, or a batch without another
    image, gives none.
    """
    same_BB = instance_ids[:, None] == instance_ids[None, :]
    same_BB.fill_diagonal_(False)
    anchors, positives = same_BB.nonzero(as_tuple=True)
    if not len(anchors) or bool((instance_ids == instance_ids[0]).all()):
        nothing = anchors[:0]
        return Triplets(nothing, nothing, nothing)
    weights_BB = negative_weights(descriptors, instance_ids, mode, cutoff, nonzero_loss_cutoff)
    negatives = torch.multinomial(weights_BB[anchors], 1, generator=generator)[:, 0]
    return Triplets(anchors, positives, negatives)

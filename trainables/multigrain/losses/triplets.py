"""Triplets for the margin loss: every ordered pair of copies, each with a sampled negative.

Negatives follow the distribution of Wu et al., "Sampling matters in deep embedding learning" (2017). The pairs are
found on the CPU, from the instance ids alone; everything that needs the descriptors stays on their device, so that a
training step never waits for the device.
Shapes: B views, R of them anchors, C channels, P ordered pairs of copies, K most pairs of one anchor.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

NegativeMode = Literal["distance_weighted", "uniform", "reference"]

ALL = slice(None)


class Triplets(NamedTuple):
    """Indices into a batch, each (P',) with P' <= P: anchor, another copy of its image, a view of another image."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor


def positive_pairs(instance_ids: Tensor, rows: slice = ALL) -> tuple[Tensor, Tensor, Tensor]:
    """All ordered pairs of different views of one image, sorted by anchor, as (P,) tensors on the CPU.

    There are none if all views show the same image, which leaves no negatives.

    Args:
        instance_ids: (B,) integers; views with the same id show the same image.
        rows: the views that are anchors.
    Returns:
        Anchors, positives, and the position of each pair among the pairs of its anchor, in [0, K).
    """
    ids = instance_ids.cpu().numpy()
    _, groups, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    anchors = np.arange(len(ids))[rows] if len(sizes) > 1 else np.arange(0)
    members = np.argsort(groups, kind="stable")
    first = np.cumsum(sizes) - sizes
    counts = sizes[groups[anchors]]
    anchors_P = anchors.repeat(counts)
    within_P = np.arange(len(anchors_P)) - (np.cumsum(counts) - counts).repeat(counts)
    positives_P = members[first[groups[anchors_P]] + within_P]
    other = anchors_P != positives_P
    # The anchor is a member of its own group: the members behind it move up by one.
    order_P = within_P - (positives_P > anchors_P)
    return tuple(torch.from_numpy(indices[other]) for indices in (anchors_P, positives_P, order_P))  # type: ignore[return-value]


def _distance_weights(
    cosines_RB: Tensor, different_RB: Tensor, cutoff: float, nonzero_loss_cutoff: float, dimension: int
) -> tuple[Tensor, Tensor]:
    """Weights of the mode `distance_weighted`, as `_weights` returns them; overwrites the cosines.

    With s = 1 - d^2/2, 1 / q(d) is (1 - s^2)^(-(n-3)/2) (1 - s)^(-1/2) up to a factor: one logarithm, one
    exponential. The largest exponent of each row is subtracted before the exponential, after masking: at n = 2048 the
    exponents span 1484, and with one maximum for all rows a single hard pair would underflow all other rows.
    """
    near_RB = cosines_RB > 1 - nonzero_loss_cutoff**2 / 2
    near_RB &= different_RB
    fallback_R = ~near_RB.any(dim=1)
    s_RB = cosines_RB.clamp_(-1 + 1e-6, 1 - cutoff**2 / 2)
    s_RB.mul_(~fallback_R[:, None])  # equal weights, those of s = 0
    candidates_RB = torch.where(fallback_R[:, None], different_RB, near_RB)
    factor_RB = (1 - s_RB).rsqrt_()
    exponents_RB = s_RB.square_().neg_().log1p_().mul_(-0.5 * (dimension - 3)).masked_fill_(~candidates_RB, -torch.inf)
    # A row without any candidate would subtract infinity from infinity.
    peak_R1 = exponents_RB.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(s_RB.dtype).min)
    return exponents_RB.sub_(peak_R1).exp_().mul_(factor_RB), fallback_R & different_RB.any(dim=1)


def _reference_weights(
    cosines_BB: Tensor, different_RB: Tensor, rows: slice, cutoff: float, nonzero_loss_cutoff: float, channels: int
) -> tuple[Tensor, Tensor]:
    """Weights of the mode `reference`, as `_weights` returns them: the released code's arithmetic, in fp32.

    One maximum is subtracted from the whole matrix, positives and diagonal included, before the exponential. From some
    500 channels on, one pair closer than the cutoff underflows the weights of all other rows, which then are uniform.
    The NaN that the released code gets from negative squares is not reproduced.
    """
    squares_BB = (2 - 2 * cosines_BB.float()).clamp(min=0)
    squares_BB.fill_diagonal_(1.0)  # the released code sets a view's distance to itself to 1
    distances_BB = squares_BB.sqrt()
    d_BB = distances_BB.clamp(min=cutoff)
    sphere_BB = (1 - 0.25 * d_BB.square()).clamp(min=torch.finfo(torch.float32).tiny)
    logs_BB = (2 - channels) * d_BB.log() - 0.5 * (channels - 3) * sphere_BB.log()
    shares_RB = (logs_BB[rows] - logs_BB.max()).exp()
    weights_RB = shares_RB * different_RB * (distances_BB[rows] < nonzero_loss_cutoff)
    fallback_R = weights_RB.sum(dim=1) == 0
    weights_RB = torch.where(fallback_R[:, None], different_RB.float(), weights_RB)
    return weights_RB, fallback_R & different_RB.any(dim=1)


@torch.no_grad()
def _weights(
    descriptors: Tensor,
    instance_ids: Tensor,
    mode: NegativeMode,
    cutoff: float,
    nonzero_loss_cutoff: float,
    dimension: int,
    rows: slice,
) -> tuple[Tensor, Tensor]:
    """Weights (R, B), not normalised, of each view as an anchor's negative, and `fallback` (R,).

    `fallback` is True where all other images are too far, so that they get equal weights.
    """
    ids = instance_ids.to(descriptors.device, non_blocking=True)
    different_RB = ids[rows, None] != ids[None, :]
    if mode == "uniform":
        return different_RB.to(descriptors.dtype), torch.zeros_like(different_RB[:, 0])
    descriptors = descriptors.detach()
    channels = descriptors.shape[1]
    if mode == "reference":
        cosines_BB = descriptors @ descriptors.T
        return _reference_weights(cosines_BB, different_RB, rows, cutoff, nonzero_loss_cutoff, channels)
    cosines_RB = descriptors[rows] @ descriptors.T
    return _distance_weights(cosines_RB, different_RB, cutoff, nonzero_loss_cutoff, dimension or channels)


def negative_weights(
    descriptors: Tensor,
    instance_ids: Tensor,
    mode: NegativeMode = "distance_weighted",
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
    dimension: int = 0,
) -> Tensor:
    """Probabilities (B, B) of drawing view j as the negative of view i.

    Rows sum to 1, or to 0 if the batch holds no other image. No gradient flows back.

    Args:
        descriptors: (B, C) of unit norm.
        instance_ids: (B,) integers; views with the same id show the same image.
        mode: `distance_weighted`: proportional to 1 / q(d), where q(d) = d^(n-2) (1 - d^2/4)^((n-3)/2) is the density
            of distances between random points on the sphere in n dimensions. `uniform`: equal for all views of other
            images. `reference`: `distance_weighted` in the arithmetic of the released code, underflow included.
        cutoff: smaller distances count as this one.
        nonzero_loss_cutoff: views farther than this get 0; a row whose other images are all farther is uniform.
        dimension: n; 0 means C. At C = 2048 nearly all weight lies on one negative; a lower n spreads it.
    """
    weights_BB, _ = _weights(descriptors, instance_ids, mode, cutoff, nonzero_loss_cutoff, dimension, ALL)
    total_B1 = weights_BB.sum(dim=1, keepdim=True)
    return weights_BB / torch.where(total_B1 > 0, total_B1, 1)


def _draw(weights_RB: Tensor, uniform_RK: Tensor) -> Tensor:
    """Draw K columns for each row, (R, K), independently of each other, by inverting the distribution function."""
    # In fp64: a parallel sum in fp32 is not monotonic, and could choose a column without weight.
    function_RB = weights_RB.cumsum(dim=1, dtype=torch.float64)
    total_R1 = function_RB[:, -1:]
    wanted_RK = torch.minimum(uniform_RK * total_R1, total_R1.nextafter(torch.zeros_like(total_R1)))
    # The clamp serves rows without any weight, whose result is not used.
    return torch.searchsorted(function_RB, wanted_RK, right=True).clamp_(max=weights_RB.shape[1] - 1)


def _draw_without_replacement(weights_RB: Tensor, uniform_RB: Tensor, draws: int) -> Tensor:
    """Draw different columns in each row, (R, K): those with the largest log-weight plus Gumbel noise."""
    # At 0 the noise would be infinite, and would favour columns without weight.
    keys_RB = weights_RB.log() - (-uniform_RB.clamp(min=2.0**-54).log()).log()
    return keys_RB.topk(draws, dim=1).indices


def draw_triplets(
    descriptors: Tensor,
    instance_ids: Tensor,
    mode: NegativeMode = "distance_weighted",
    generator: torch.Generator | None = None,
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
    dimension: int = 0,
    rows: slice = ALL,
) -> tuple[Triplets, Tensor]:
    """`sample_triplets` of the anchors in `rows`, and the number (1,) of anchors whose other images were all too far.

    The random numbers of all B views are drawn, whatever the rows: ranks that share a batch and the state of their
    generators draw what one process would draw.
    """
    device, size = descriptors.device, len(descriptors)
    pairs = positive_pairs(instance_ids, rows)
    anchors, positives, order = (indices.to(device, non_blocking=True) for indices in pairs)
    order_of_all = positive_pairs(instance_ids)[2]
    if not len(order_of_all):
        return Triplets(anchors, positives, anchors), descriptors.new_zeros(1)
    draws = int(order_of_all.max()) + 1
    weights_RB, fallback_R = _weights(descriptors, instance_ids, mode, cutoff, nonzero_loss_cutoff, dimension, rows)
    uniform_BK = torch.rand(size, draws, generator=generator, device=device, dtype=torch.float64)
    negatives_RK = _draw(weights_RB, uniform_BK[rows])
    if mode == "reference" and draws <= size:
        uniform_BB = torch.rand(size, size, generator=generator, device=device, dtype=torch.float64)
        enough_R1 = (weights_RB > 0).sum(dim=1, keepdim=True) >= draws
        different_RK = _draw_without_replacement(weights_RB, uniform_BB[rows], draws)
        negatives_RK = torch.where(enough_R1, different_RK, negatives_RK)
    first = range(size)[rows].start
    return Triplets(anchors, positives, negatives_RK[anchors - first, order]), fallback_R.sum()[None]


def sample_triplets(
    descriptors: Tensor,
    instance_ids: Tensor,
    mode: NegativeMode = "distance_weighted",
    generator: torch.Generator | None = None,
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
    dimension: int = 0,
) -> Triplets:
    """All ordered pairs of copies, each with one negative drawn by `negative_weights`, whose arguments it takes.

    An image with m copies gives m (m - 1) triplets; an image with one view, or a batch of one image, gives none. The
    negatives of an anchor are drawn independently; in the mode `reference` they differ, as long as there are enough
    views with a weight above 0.

    Args:
        instance_ids: (B,) integers, best on the CPU: elsewhere the call waits for the device.
        generator: a random generator on the descriptors' device; torch's own by default.
    """
    return draw_triplets(descriptors, instance_ids, mode, generator, cutoff, nonzero_loss_cutoff, dimension)[0]

"""Which pairs the margin loss compares: every pair of copies, and a sampled negative for each.

The distribution is that of Wu et al., "Sampling matters in deep embedding learning". Which views are
copies of which is worked out on the host, from numbers that the host knows; all that needs the
descriptors stays on their device, so that a training step never waits for it.
Shape legend: B views, R of them anchors, C channels, P ordered positive pairs, K pairs of one anchor at most.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

NegativeMode = Literal["distance_weighted", "uniform", "reference"]

ALL = slice(None)


class Triplets(NamedTuple):
    """Index tensors of shape (P',), P' <= P: anchor i, another copy of its image, a view of another image."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor


def positive_pairs(instance_ids: Tensor, rows: slice = ALL) -> tuple[Tensor, Tensor, Tensor]:
    """All ordered pairs of different views with one instance, by anchor, as (P,) tensors on the CPU.

    None where all views show one instance: there is no negative for them.

    Args:
        instance_ids: (B,) integers.
        rows: the views that are anchors.
    Returns:
        anchors, positives, and the position of each pair among those of its anchor, in [0, K).
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
    # An anchor stands once among its own group; those behind it move up by one.
    order_P = within_P - (positives_P > anchors_P)
    return tuple(torch.from_numpy(indices[other]) for indices in (anchors_P, positives_P, order_P))  # type: ignore[return-value]


class _Weights(NamedTuple):
    """How likely each view is to be an anchor's negative."""

    weights: Tensor
    """(R, B), not normalised."""
    fallback: Tensor
    """(R,), whether all other images were too far, and are therefore weighted alike."""


def _distance_weights(
    cosines_RB: Tensor, different_RB: Tensor, cutoff: float, nonzero_loss_cutoff: float, dimension: int
) -> _Weights:
    """1 / q(d), with q(d) = d^(n-2) (1 - d^2/4)^((n-3)/2), up to a factor for each row; overwrites the cosines.

    With s = 1 - d^2/2, 1 / q is (1 - s^2)^(-(n-3)/2) (1 - s)^(-1/2) up to a factor: one logarithm, one
    exponential. The largest exponent of the row is taken out before the exponential, after masking: at
    n = 2048 they span 1484, and one hard pair elsewhere in the batch would leave a row nothing.
    """
    near_RB = cosines_RB > 1 - nonzero_loss_cutoff**2 / 2
    near_RB &= different_RB
    fallback_R = ~near_RB.any(dim=1)
    s_RB = cosines_RB.clamp_(-1 + 1e-6, 1 - cutoff**2 / 2)
    s_RB.mul_(~fallback_R[:, None])  # all alike, at s = 0
    candidates_RB = torch.where(fallback_R[:, None], different_RB, near_RB)
    factor_RB = (1 - s_RB).rsqrt_()
    exponents_RB = s_RB.square_().neg_().log1p_().mul_(-0.5 * (dimension - 3)).masked_fill_(~candidates_RB, -torch.inf)
    # A row without any candidate would subtract infinity from infinity.
    peak_R1 = exponents_RB.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(s_RB.dtype).min)
    return _Weights(exponents_RB.sub_(peak_R1).exp_().mul_(factor_RB), fallback_R & different_RB.any(dim=1))


def _reference_weights(
    cosines_BB: Tensor, different_RB: Tensor, rows: slice, cutoff: float, nonzero_loss_cutoff: float, channels: int
) -> _Weights:
    """What the authors' released code computes, in fp32.

    One maximum is taken out of the whole matrix, positives and diagonal included, before the exponential,
    so that one pair closer than the cutoff sends all other weights below the smallest number from some
    500 channels on: its rows then have no weight left, and are uniform. Their NaN from negative squares is not kept.
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
    return _Weights(weights_RB, fallback_R & different_RB.any(dim=1))


@torch.no_grad()
def _weights(
    descriptors: Tensor,
    instance_ids: Tensor,
    mode: NegativeMode,
    cutoff: float,
    nonzero_loss_cutoff: float,
    dimension: int,
    rows: slice,
) -> _Weights:
    ids = instance_ids.to(descriptors.device, non_blocking=True)
    different_RB = ids[rows, None] != ids[None, :]
    if mode == "uniform":
        return _Weights(different_RB.to(descriptors.dtype), torch.zeros_like(different_RB[:, 0]))
    descriptors = descriptors.detach()
    channels = descriptors.shape[1]
    if mode == "reference":
        return _reference_weights(
            descriptors @ descriptors.T, different_RB, rows, cutoff, nonzero_loss_cutoff, channels
        )
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
    """Probability (B, B) of drawing column j as the negative of row i.

    `distance_weighted`: w(d) = 1 / q(d), where q(d) = d^(n-2) (1 - d^2/4)^((n-3)/2) is the density of
    distances between random points of the sphere in n dimensions; d is raised to `cutoff` first, and views
    farther than `nonzero_loss_cutoff` get nothing. A row whose other images all lie beyond it is uniform.
    `uniform`: every view of another image alike.
    `reference`: as `distance_weighted`, in the arithmetic of the authors' released code, underflow included.

    Rows sum to 1, or to 0 where the batch holds no other image. No gradient flows back.

    Args:
        descriptors: (B, C) of unit norm.
        instance_ids: (B,) integers; views with the same id show the same image.
        dimension: n; 0 is C. At C = 2048 nearly all weight lies on one negative; a lower n spreads it.
    """
    weights_BB = _weights(descriptors, instance_ids, mode, cutoff, nonzero_loss_cutoff, dimension, ALL).weights
    total_B1 = weights_BB.sum(dim=1, keepdim=True)
    return weights_BB / torch.where(total_B1 > 0, total_B1, 1)


def _draw(weights_RB: Tensor, uniform_RK: Tensor) -> Tensor:
    """K columns for each row, (R, K), by inverting the distribution function; independent of each other."""
    # In fp64: a parallel sum in fp32 is not monotonic, and could hit a column without weight.
    function_RB = weights_RB.cumsum(dim=1, dtype=torch.float64)
    total_R1 = function_RB[:, -1:]
    wanted_RK = torch.minimum(uniform_RK * total_R1, total_R1.nextafter(torch.zeros_like(total_R1)))
    # The last column is a guard for rows without any weight, which nobody asks for.
    return torch.searchsorted(function_RB, wanted_RK, right=True).clamp_(max=weights_RB.shape[1] - 1)


def _draw_without_replacement(weights_RB: Tensor, uniform_RB: Tensor, draws: int) -> Tensor:
    """Different columns in each row, (R, K): the largest of log w plus Gumbel noise."""
    # At 0 the noise would be infinite, and no weight would outdo none.
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
    """`sample_triplets` of the anchors in `rows`, and how many of these drew from all other images alike, (1,).

    The random numbers of all B views are drawn, whatever the rows: ranks that share a batch and the state
    of their generators draw what one process would.
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
    """All ordered pairs of copies, each with one negative drawn from `negative_weights`.

    A group of m copies gives m (m - 1) triplets; an image without a copy, or a batch without another
    image, gives none. The negatives of one anchor are drawn independently; in the mode `reference` they
    differ, as long as there are enough with a weight.

    Args:
        descriptors: (B, C) of unit norm.
        instance_ids: (B,) integers; on the CPU, lest the host wait for the device.
        generator: of the descriptors' device.
    """
    return draw_triplets(descriptors, instance_ids, mode, generator, cutoff, nonzero_loss_cutoff, dimension)[0]

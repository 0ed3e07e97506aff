"""Generalised-mean pooling (GeM), the paper's equation 1."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def gem(x: Tensor, p: float | Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised mean of feature maps over their positions u: (mean of max(x_u, eps)^p)^(1/p), the paper's equation 1.

    The number p = 1 gives the plain average, without the clamp; p = inf gives the maximum. The largest value is
    factored out before the power, because x^p itself leaves fp16 at x = 50, p = 3 and fp32 at x = 4, p = 100.

    Args:
        x: maps of shape (..., H, W).
        p: exponent, at least 1; a tensor of one element receives a gradient.
        eps: smallest value of the clamp, positive.
    Returns:
        Tensor of shape (...), computed in fp32 or wider.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not isinstance(p, Tensor):
        if p == 1:
            return x.mean(dim=(-2, -1))
        if math.isinf(p):
            return x.amax(dim=(-2, -1))
    wide = x.clamp(min=eps)
    # The result does not depend on the factor, so no gradient needs to pass through it.
    peak = wide.detach().amax(dim=(-2, -1), keepdim=True)
    mean = (wide / peak).pow(p).mean(dim=(-2, -1))
    return peak[..., 0, 0] * mean.pow(1 / p)


LARGEST_PRODUCT = 16.0
"""Largest exponent that `gem_all` computes by multiplications, each of which rounds once."""


@torch.no_grad()
def gem_all(x: Tensor, exponents: Sequence[float], eps: float = 1e-6) -> Tensor:
    """`gem` for many exponents, at little more than the cost of one, without gradients.

    Multiples of 1/2 up to 16 are computed by repeated multiplication, other exponents by an exponential.

    Args:
        x: maps of shape (..., H, W).
        exponents: P numbers, at least 1, in any order.
        eps: smallest value of the clamp, positive.
    Returns:
        Tensor of shape (P, ...), computed in fp32 or wider.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = x.clamp(min=eps)
    peak = wide.amax(dim=(-2, -1), keepdim=True)
    ratio = wide / peak
    root, log = ratio.sqrt(), None
    power, reached = ratio.clone(), 1.0
    pooled = {1.0: x.mean(dim=(-2, -1)), math.inf: x.amax(dim=(-2, -1))}
    for p in sorted({*exponents} - {*pooled}):
        if p <= LARGEST_PRODUCT and 2 * p % 1 == 0:
            while reached < p:
                whole = p - reached >= 1
                power *= ratio if whole else root
                reached += 1 if whole else 0.5
            mean = power.mean(dim=(-2, -1))
        else:
            log = ratio.log() if log is None else log
            # Below e^-87 numbers are subnormal: ten times as slow, and negligible next to the peak's 1.
            mean = (log * p).clamp_(min=-87).exp_().mean(dim=(-2, -1))
        pooled[p] = peak[..., 0, 0] * mean.pow(1 / p)
    return torch.stack([pooled[p] for p in exponents])


class _AtLeastOne(torch.autograd.Function):
    """max(p, 1), with a gradient that is cut only if it would lower p further below 1, so that p can rise again."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return p.clamp(min=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return gradient.masked_fill((p < 1) & (gradient > 0), 0)


class GeM(nn.Module):
    """Pooling layer by `gem`: its exponent p is a number, or a parameter, which counts as 1 if it falls below 1."""

    p: float | Tensor

    def __init__(self, p: float = 3.0, learnable: bool = False) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(float(p))) if learnable else float(p)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        return gem(x, _AtLeastOne.apply(self.p) if isinstance(self.p, Tensor) else self.p)

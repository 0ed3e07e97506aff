"""Generalised-mean pooling (GeM), the paper's equation 1."""

import math

import torch
from torch import Tensor, nn


def gem(x: Tensor, p: float | Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised mean of a feature map over its positions.

    e_c = (mean over u of max(x_cu, eps)^p)^(1/p), the paper's equation 1. p = 1 as a number is the
    plain average, without the clamp; p = inf is the maximum.

    The largest value is factored out before the power, and the power is taken in fp32 at least:
    x^p itself leaves fp16 at x = 50, p = 3 and fp32 at x = 4, p = 100.

    Args:
        x: maps of shape (..., H, W).
        p: exponent, at least 1; a tensor of one element is differentiated through.
        eps: floor of the clamp, positive.
    Returns:
        Tensor of shape (...), in the type of `x`.
    """
    if not isinstance(p, Tensor):
        if p == 1:
            return x.mean(dim=(-2, -1))
        if math.isinf(p):
            return x.amax(dim=(-2, -1))
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(min=eps)
    # A constant in effect: the result does not depend on the factor, so no gradient needs to pass through it.
    peak = wide.detach().amax(dim=(-2, -1), keepdim=True)
    mean = (wide / peak).pow(p).mean(dim=(-2, -1))
    return (peak[..., 0, 0] * mean.pow(1 / p)).to(x.dtype)


class GeM(nn.Module):
    """`gem` with an exponent of its own: a number, or a parameter that learns."""

    p: float | Tensor

    def __init__(self, p: float = 3.0, learnable: bool = False) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(float(p))) if learnable else float(p)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        return gem(x, self.p)

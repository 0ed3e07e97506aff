"""PCA whitening of embeddings (the paper's Phi, as in the released code), and its fold into the classifier."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from multigrain.models.multigrain import l2_normalise

FLOOR = 1e-10
"""Smallest eigenvalue, as a share of the largest; well above the errors of embeddings rounded to fp32."""
ROWS = 2048
"""Number of embeddings converted to fp64 at a time."""
STRIPE = 256
"""Number of rows of the scatter computed at a time, each from the diagonal on, as the matrix is symmetric."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """Map of an embedding e to z = (v - mu) P with v = l2([e; 1]), whose components are uncorrelated with variance 1.

    The descriptor is l2(z). The constant channel, appended before the normalisation, keeps the length of the embedding.
    All is computed in fp64 on the embeddings' device: in fp32 the eigenvectors of small eigenvalues are noise.
    """

    mean: Tensor
    """(C + 1,), fp64: mu."""
    projection: Tensor
    """(C + 1, D), fp64: P, directions of largest variance first."""

    @classmethod
    @torch.no_grad()
    def fit(cls, embeddings: Tensor | Iterable[Tensor], dimension: int | None = None, floor: float = FLOOR) -> Self:
        """Fit a whitening to representative embeddings, in one pass that keeps only the moments of v in memory.

        Args:
            embeddings: (N, C), not normalised, or chunks (n, C) of them.
            dimension: D, number of directions to keep; all C + 1 by default.
            floor: smallest eigenvalue of the covariance, as a share of the largest, in (0, 1]; smaller ones count as
                this, so that dead channels are not amplified.
        Raises:
            ValueError: N is not above D, an embedding is not finite, all are equal, or shapes differ.
        """
        if not 0 < floor <= 1:
            raise ValueError(f"the floor of the eigenvalues must lie in (0, 1], got {floor}; {FLOOR} suits fp32")
        count, mean, scatter = _moments([embeddings] if isinstance(embeddings, Tensor) else embeddings)
        width = len(mean)
        kept = width if dimension is None else dimension
        if not 1 <= kept <= width:
            raise ValueError(f"the dimension must lie in [1, C + 1], got {kept} of {width}; leave it out for all")
        if count <= kept:
            raise ValueError(
                f"whitening needs more embeddings than dimensions, got {count} for {kept}; "
                f"give {kept + 1} or more, or set a smaller dimension"
            )
        variances, directions = torch.linalg.eigh(scatter / (count - 1), UPLO="U")  # ascending
        if variances[-1] <= torch.finfo(variances.dtype).eps:
            raise ValueError(f"whitening needs embeddings that differ, got {count} equal ones; check the network")
        variances = variances.clamp(min=floor * variances[-1])
        return cls(mean, (directions / variances.sqrt())[:, -kept:].flip(1).contiguous())

    def project(self, embeddings: Tensor) -> Tensor:
        """Whitened embeddings z (B, D), not normalised, of embeddings (B, C), in their type."""
        z = (_normalised(embeddings) - self.mean.to(embeddings.device)) @ self.projection.to(embeddings.device)
        return z.to(embeddings.dtype)

    def transform(self, embeddings: Tensor) -> Tensor:
        """Descriptors (B, D) of unit norm of embeddings (B, C), in their type."""
        return l2_normalise(self.project(embeddings.double())).to(embeddings.dtype)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (K, C + 1) and bias (K,) of the classifier that reads z in place of the embedding e.

        Its logits are the original ones divided by |[e; 1]| + 1e-6: the classes keep their order, the softmax differs.

        Args:
            weight: (K, C) of the classifier that reads e.
            bias: (K,) of that classifier.
        Raises:
            ValueError: the whitening keeps fewer than C + 1 directions, so that z does not determine the logits.
        """
        width, dimension = self.projection.shape
        if dimension < width:
            raise ValueError(f"a fold needs all {width} directions, got {dimension}; fit without a dimension")
        whole = torch.cat([weight, bias[:, None]], dim=1).double()
        # P's columns are orthogonal: its inverse, transposed, is P with each column divided by its squared norm.
        inverse = self.projection / self.projection.square().sum(dim=0)
        return (whole @ inverse.to(whole.device)).to(weight.dtype), (whole @ self.mean.to(whole.device)).to(bias.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors `mean` and `projection`."""
        return {"mean": self.mean, "projection": self.projection}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Restore a whitening from its `state_dict`."""
        return cls(state["mean"], state["projection"])


def _normalised(embeddings: Tensor) -> Tensor:
    """v = l2([e; 1]) of embeddings (n, C): (n, C + 1), fp64."""
    return l2_normalise(torch.nn.functional.pad(embeddings.double(), (0, 1), value=1.0))


def _moments(chunks: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Number, mean (C + 1,) and scatter, the sum of (v - mean)(v - mean)^T, of all v, in fp64.

    Only the upper triangle of the scatter is valid. Each chunk is centred by its own mean, because sums of raw products
    would lose the small variances.
    """
    count, mean, scatter = 0, torch.empty(0), torch.empty(0)
    for chunk in (part for whole in chunks for part in torch.split(whole, ROWS) if len(part)):
        if chunk.ndim != 2 or (count and chunk.shape[1] + 1 != len(mean)):
            expected = f"(n, {len(mean) - 1})" if count else "(n, C)"
            raise ValueError(f"embeddings must have the shape {expected}, got {tuple(chunk.shape)}; give one network's")
        if not chunk.isfinite().all():
            row = int((~chunk.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"embeddings must be finite, got nan or inf in number {count + row}; leave it out")
        v = _normalised(chunk)
        if not count:
            mean, scatter = v.new_zeros(v.shape[1]), v.new_zeros(v.shape[1], v.shape[1])
        total = count + len(v)
        own = v.mean(dim=0)
        shift = own - mean
        v -= own
        for start in range(0, len(mean), STRIPE):
            scatter[start : start + STRIPE, start:].addmm_(v[:, start : start + STRIPE].T, v[:, start:])
        scatter.addr_(shift, shift, alpha=count * len(v) / total)
        mean += shift * (len(v) / total)
        count = total
    if not count:
        raise ValueError("whitening needs embeddings, got none; give more of them than they have channels")
    return count, mean, scatter

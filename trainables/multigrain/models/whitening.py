"""PCA whitening of embeddings, and its fold into the classifier: the paper's Phi, as its authors' code has it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from multigrain.models.multigrain import l2_normalise

FLOOR = 1e-10
"""Share of the largest eigenvalue; well above what rounding embeddings to fp32 leaves."""
ROWS = 2048
"""Embeddings that are made fp64 at a time."""
STRIPE = 256
"""Rows of the scatter that are computed at a time, each from the diagonal on: the other half is the same."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """v = l2([e; 1]) -> z = (v - mu) P, whose components have variance 1 and no correlation; a descriptor is l2(z).

    The constant channel, appended before the normalisation, keeps the length of the embedding e in the
    descriptor. All is computed in fp64, on the device of the embeddings: in fp32 the eigenvectors of the
    small eigenvalues are noise.
    """

    mean: Tensor
    """(C + 1,), fp64: mu."""
    projection: Tensor
    """(C + 1, D), fp64: P, the direction of the largest variance first."""

    @classmethod
    @torch.no_grad()
    def fit(cls, embeddings: Tensor | Iterable[Tensor], dimension: int | None = None, floor: float = FLOOR) -> Self:
        """Whitening of embeddings that stand for those to come; one pass, in memory for the moments of v only.

        Args:
            embeddings: (N, C), not normalised, or chunks of them (n, C).
            dimension: D, how many directions to keep; all C + 1 by default.
            floor: in (0, 1]; smaller eigenvalues of the covariance count as this share of the largest, so
                that a dead channel is not blown up.
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
        """z, not normalised: (B, C) -> (B, D), in the embeddings' type."""
        z = (_normalised(embeddings) - self.mean.to(embeddings.device)) @ self.projection.to(embeddings.device)
        return z.to(embeddings.dtype)

    def transform(self, embeddings: Tensor) -> Tensor:
        """Descriptors of unit norm: (B, C) -> (B, D), in the embeddings' type."""
        return l2_normalise(self.project(embeddings.double())).to(embeddings.dtype)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The classifier that reads z in place of the embedding e.

        Its logits are the original ones divided by |[e; 1]| + 1e-6: the ranking of the classes is the same,
        the softmax is not.

        Args:
            weight: (K, C) of the classifier that reads e.
            bias: (K,).
        Returns:
            (K, C + 1) and (K,), in the types of `weight` and `bias`.
        Raises:
            ValueError: directions were left out, so that the logits cannot be had from z.
        """
        width, dimension = self.projection.shape
        if dimension < width:
            raise ValueError(f"a fold needs all {width} directions, got {dimension}; fit without a dimension")
        whole = torch.cat([weight, bias[:, None]], dim=1).double()
        # P's columns are orthogonal: its inverse, transposed, is P with each column divided by its squared norm.
        inverse = self.projection / self.projection.square().sum(dim=0)
        return (whole @ inverse.to(whole.device)).to(weight.dtype), (whole @ self.mean.to(whole.device)).to(bias.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """`mean` and `projection`."""
        return {"mean": self.mean, "projection": self.projection}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """What `state_dict` gave."""
        return cls(state["mean"], state["projection"])


def _normalised(embeddings: Tensor) -> Tensor:
    """v = l2([e; 1]): (n, C) -> (n, C + 1), fp64."""
    return l2_normalise(torch.nn.functional.pad(embeddings.double(), (0, 1), value=1.0))


def _moments(chunks: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Number, mean (C + 1,) and scatter (C + 1, C + 1) of v: sum of (v - mean)(v - mean)^T, fp64.

    Only the upper triangle of the scatter is that.
    Each chunk is centred by its own mean: sums of raw products would lose the small variances.
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

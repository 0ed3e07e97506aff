"""MultiGrain: one image embedding for the class, the particular object and the copy (arXiv:1902.05509).

Plain PyTorch. The public names below are imported on first use, so that reading a settings
class does not cost an import of torch.
"""

import importlib
from typing import Any

_HOME = {
    "GeM": "models.pooling",
    "MarginLoss": "losses.margin",
    "MultiGrain": "models.multigrain",
    "MultiGrainSpec": "config.training",
    "RepeatedAugmentationBatches": "data.sampler",
    "Whitening": "models.whitening",
    "fit": "training.fit",
    "gem": "models.pooling",
    "margin_loss": "losses.margin",
    "mean_average_precision": "retrieval.ranking",
    "negative_weights": "losses.triplets",
    "sample_triplets": "losses.triplets",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 - computed, so that it cannot drift from the table


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'multigrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"multigrain.{_HOME[name]}"), name)

"""MultiGrain: one image embedding for the class, the particular object and the copy (arXiv:1902.05509).

Plain PyTorch. The public names below are imported on first use, so that reading a settings
class does not cost an import of torch.
"""

import importlib
from typing import Any

_HOME = {
    "GeM": "pooling",
    "MarginLoss": "losses",
    "MultiGrain": "model",
    "MultiGrainSpec": "spec",
    "RepeatedAugmentationBatches": "batches",
    "Whitening": "whitening",
    "fit": "fit",
    "gem": "pooling",
    "margin_loss": "losses",
    "mean_average_precision": "search",
    "negative_weights": "sampling",
    "sample_triplets": "sampling",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 - computed, so that it cannot drift from the table


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'multigrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"multigrain.{_HOME[name]}"), name)

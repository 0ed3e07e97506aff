"""MultiGrain: one image embedding for the class, the particular object and the copy (arXiv:1902.05509).

The public API of the method, in plain PyTorch, for one's own training loop, script or notebook. Each name is imported
on first use, so that `import multigrain` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of the table below, for type checkers and editors
    from multigrain.config.training import AugmentSettings as AugmentSettings
    from multigrain.config.training import MultiGrainSpec as MultiGrainSpec
    from multigrain.data.dataset import Dataset as Dataset
    from multigrain.data.folders import read_dataset as read_dataset
    from multigrain.data.loading import decode as decode
    from multigrain.data.sampler import RepeatedAugmentationBatches as RepeatedAugmentationBatches
    from multigrain.data.transforms import TrainTransform as TrainTransform
    from multigrain.data.transforms import colour as colour
    from multigrain.data.transforms import evaluation_view as evaluation_view
    from multigrain.errors import DataError as DataError
    from multigrain.export.inference import load as load
    from multigrain.losses.joint import JointLoss as JointLoss
    from multigrain.losses.margin import MarginLoss as MarginLoss
    from multigrain.losses.margin import classification_loss as classification_loss
    from multigrain.losses.margin import entropy_loss as entropy_loss
    from multigrain.losses.margin import margin_loss as margin_loss
    from multigrain.losses.triplets import Triplets as Triplets
    from multigrain.losses.triplets import negative_weights as negative_weights
    from multigrain.losses.triplets import sample_triplets as sample_triplets
    from multigrain.models.multigrain import MultiGrain as MultiGrain
    from multigrain.models.multigrain import load_network as load_network
    from multigrain.models.pooling import GeM as GeM
    from multigrain.models.pooling import gem as gem
    from multigrain.models.weights import load_weights as load_weights
    from multigrain.models.whitening import Whitening as Whitening
    from multigrain.retrieval.metrics import Truth as Truth
    from multigrain.retrieval.metrics import average_precision as average_precision
    from multigrain.retrieval.metrics import micro_ap as micro_ap
    from multigrain.retrieval.metrics import recall_at as recall_at
    from multigrain.retrieval.metrics import same_label as same_label
    from multigrain.retrieval.ranking import mean_average_precision as mean_average_precision
    from multigrain.retrieval.ranking import pairs as pairs
    from multigrain.retrieval.ranking import ranks as ranks
    from multigrain.training.fit import EpochResult as EpochResult
    from multigrain.training.fit import fit as fit
    from multigrain.training.trainer import TrainingError as TrainingError

_PUBLIC = {
    "AugmentSettings": "config.training",
    "MultiGrainSpec": "config.training",
    "Dataset": "data.dataset",
    "read_dataset": "data.folders",
    "decode": "data.loading",
    "RepeatedAugmentationBatches": "data.sampler",
    "TrainTransform": "data.transforms",
    "colour": "data.transforms",
    "evaluation_view": "data.transforms",
    "DataError": "errors",
    "load": "export.inference",
    "JointLoss": "losses.joint",
    "MarginLoss": "losses.margin",
    "classification_loss": "losses.margin",
    "entropy_loss": "losses.margin",
    "margin_loss": "losses.margin",
    "Triplets": "losses.triplets",
    "negative_weights": "losses.triplets",
    "sample_triplets": "losses.triplets",
    "MultiGrain": "models.multigrain",
    "load_network": "models.multigrain",
    "GeM": "models.pooling",
    "gem": "models.pooling",
    "load_weights": "models.weights",
    "Whitening": "models.whitening",
    "Truth": "retrieval.metrics",
    "average_precision": "retrieval.metrics",
    "micro_ap": "retrieval.metrics",
    "recall_at": "retrieval.metrics",
    "same_label": "retrieval.metrics",
    "mean_average_precision": "retrieval.ranking",
    "pairs": "retrieval.ranking",
    "ranks": "retrieval.ranking",
    "EpochResult": "training.fit",
    "fit": "training.fit",
    "TrainingError": "training.trainer",
}

__all__ = list(_PUBLIC)

if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'multigrain' has no attribute {name!r}")
        return getattr(importlib.import_module(f"multigrain.{_PUBLIC[name]}"), name)

    def __dir__() -> list[str]:
        return [*globals(), *_PUBLIC]

"""MultiGrain: one image embedding for the class, the particular object and the copy (arXiv:1902.05509).

Plain PyTorch, for use in one's own training loop, script or notebook. Public names are imported on first use, so that
`import multigrain` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multigrain.config.data import DataSettings as DataSettings
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
    from multigrain.models.checkpoint import Checkpoint as Checkpoint
    from multigrain.models.multigrain import MultiGrain as MultiGrain
    from multigrain.models.pooling import GeM as GeM
    from multigrain.models.pooling import gem as gem
    from multigrain.models.weights import load_weights as load_weights
    from multigrain.models.whitening import Whitening as Whitening
    from multigrain.retrieval.metrics import Truth as Truth

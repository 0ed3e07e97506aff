"""One pass over the held-out images -> metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from multigrain.augment import EvaluationTransform, scale
from multigrain.data import Dataset
from multigrain.model import MultiGrain
from multigrain.retrieval import mean_average_precision
from multigrain.spec import MultiGrainSpec
from multigrain.views import evaluation_batches

METRICS = {
    "top1": "share of held-out images whose class is right",
    "class_map": "mAP of finding the other held-out images of a held-out image's class",
    "copy_map": "mAP of finding the original of a strongly distorted copy among originals and distractors",
    "mean_top1_copy_map": "mean of top1 and copy_map",
}
"""All in [0, 1], larger is better. Those with `copy` in their name need a copy-detection set."""


class _Outputs(NamedTuple):
    descriptors: NDArray[np.float32]
    logits: NDArray[np.float32]


def _room(network: MultiGrain, images: int) -> _Outputs:
    classifier = network.classifier
    return _Outputs(np.empty((images, classifier.in_features), "f4"), np.empty((images, classifier.out_features), "f4"))


@torch.no_grad()
def embed(
    network: MultiGrain,
    paths: Sequence[Path],
    transform: EvaluationTransform,
    size: int,
    device: torch.device,
    loaders: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Descriptors (N, C) and logits (N, K) of image files, in order, computed in fp32.

    With a process group, every rank embeds its share and gets the whole.

    Args:
        transform, size: as in `augment.evaluation_pixels`.
        loaders: processes that read the files; 0: this one does.
    """
    grouped = distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
    network.eval()
    share = paths[rank::world]
    mine = _room(network, len(share))
    with torch.autocast(device.type, enabled=False):
        for positions, images in evaluation_batches(share, transform, size, loaders=loaders):
            output = network(scale(images.to(device)))
            mine.descriptors[positions] = output.descriptor.cpu().numpy()
            mine.logits[positions] = output.logits.cpu().numpy()
    if not grouped:
        return mine
    shares = [mine] * world
    distributed.all_gather_object(shares, mine)
    whole = _room(network, len(paths))
    for index, outputs in enumerate(shares):
        whole.descriptors[index::world], whole.logits[index::world] = outputs
    return whole


def evaluate(
    network: MultiGrain, dataset: Dataset, spec: MultiGrainSpec, device: torch.device, loaders: int = 0
) -> dict[str, float]:
    """The `METRICS` that the data set has truth for."""
    copies = dataset.copies
    paths = (*dataset.val, *(copies.database if copies else ()), *(copies.queries if copies else ()))
    descriptors, logits = embed(network, paths, spec.evaluation.transform, spec.evaluation_size, device, loaders)
    labels = np.array(dataset.val_labels)
    val = len(labels)
    metrics = {"top1": float((logits[:val].argmax(axis=1) == labels).mean())}
    same_class = labels[:, None] == labels[None, :]
    itself = np.eye(val, dtype=bool)
    if (same_class & ~itself).any():
        metrics["class_map"] = mean_average_precision(descriptors[:val], descriptors[:val], same_class, itself)
    if copies:
        database, queries = descriptors[val : val + len(copies.database)], descriptors[val + len(copies.database) :]
        positive = np.arange(len(database))[None, :] == np.array(copies.truth)[:, None]
        metrics["copy_map"] = mean_average_precision(queries, database, positive)
        metrics["mean_top1_copy_map"] = (metrics["top1"] + metrics["copy_map"]) / 2
    return metrics

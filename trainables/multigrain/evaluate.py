"""One pass over the held-out images -> metrics."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from multigrain import grid
from multigrain.augment import EvaluationTransform
from multigrain.data import Dataset
from multigrain.model import MultiGrain
from multigrain.retrieval import mean_average_precision
from multigrain.spec import MultiGrainSpec

METRICS = {
    "top1": "share of held-out images whose class is right",
    "class_map": "mAP of finding the other held-out images of a held-out image's class",
    "copy_map": "mAP of finding the original of a strongly distorted copy among originals and distractors",
    "mean_top1_copy_map": "mean of top1 and copy_map",
}
"""All in [0, 1], larger is better. Those with `copy` in their name need a copy-detection set."""


@torch.no_grad()
def embed(
    network: MultiGrain,
    paths: Sequence[Path],
    transform: EvaluationTransform,
    size: int,
    device: torch.device,
    loaders: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Descriptors (N, C) and logits (N, K) of image files, with the network's own exponent; see `grid.embed`."""
    p = max(1.0, float(network.pool.p))  # one that learns counts as 1 below 1
    embeddings = grid.embed(network, paths, size, transform, [p], device, loaders)[p]
    output = network.head(torch.from_numpy(embeddings).to(device))
    return output.descriptor.cpu().numpy(), output.logits.cpu().numpy()


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

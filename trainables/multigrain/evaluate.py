"""One pass over the held-out images -> metrics."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from multigrain.data import Dataset
from multigrain.model import MultiGrain
from multigrain.retrieval import mean_average_precision
from multigrain.views import evaluation_batches

METRICS = {
    "top1": "share of held-out images whose class is right",
    "class_map": "mAP of finding the other held-out images of a held-out image's class",
    "copy_map": "mAP of finding the original of a strongly distorted copy among originals and distractors",
    "mean_top1_copy_map": "mean of top1 and copy_map",
}
"""All in [0, 1], larger is better. Those with `copy` in their name need a copy-detection set."""


@torch.no_grad()
def embed(
    network: MultiGrain, paths: Sequence[Path], size: int, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Descriptors (N, C) and logits (N, K) of image files, in order.

    With a process group, every rank embeds its share and gets the whole.
    """
    grouped = distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
    network.eval()
    outputs = [network(images.to(device)) for images in evaluation_batches(paths[rank::world], size)]
    channels, classes = network.classifier.in_features, network.classifier.out_features
    mine = (
        torch.cat([output.descriptor.cpu() for output in outputs]).numpy()
        if outputs
        else np.zeros((0, channels), "f4"),
        torch.cat([output.logits.cpu() for output in outputs]).numpy() if outputs else np.zeros((0, classes), "f4"),
    )
    if not grouped:
        return mine
    shares: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = [mine] * world
    distributed.all_gather_object(shares, mine)
    descriptors, logits = np.empty((len(paths), channels), "f4"), np.empty((len(paths), classes), "f4")
    for index, share in enumerate(shares):
        descriptors[index::world], logits[index::world] = share
    return descriptors, logits


def evaluate(network: MultiGrain, dataset: Dataset, size: int, device: torch.device) -> dict[str, float]:
    """The `METRICS` that the data set has truth for."""
    copies = dataset.copies
    paths = (*dataset.val, *(copies.database if copies else ()), *(copies.queries if copies else ()))
    descriptors, logits = embed(network, paths, size, device)
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

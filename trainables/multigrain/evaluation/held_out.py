"""Held-out images -> metrics, at the network's own setting and at others that cost no training."""

import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from multigrain import distributed
from multigrain.config.training import MultiGrainSpec, VariantSettings
from multigrain.data.dataset import Dataset
from multigrain.evaluation import embed
from multigrain.evaluation.embed import Setting
from multigrain.hooks import Heartbeat, no_heartbeat
from multigrain.models.multigrain import MultiGrain
from multigrain.models.whitening import Whitening
from multigrain.retrieval.metrics import Truth, same_label
from multigrain.retrieval.ranking import mean_average_precision

METRICS = {
    "top1": "share of held-out images whose class is right",
    "class_map": "mAP of finding the other held-out images of a held-out image's class",
    "copy_map": "mAP of finding the original of a strongly distorted copy among originals and distractors",
    "mean_top1_copy_map": "mean of top1 and copy_map",
}
"""All in [0, 1], larger is better. Those with `copy` in their name need a copy-detection set."""
WHITENED = 20_000
"""Most training images on which a whitening is fitted [R]."""

Metrics = dict[str, float]


def held_out_metrics(
    network: MultiGrain,
    dataset: Dataset,
    spec: MultiGrainSpec,
    device: torch.device,
    loaders: int = 0,
    heartbeat: Heartbeat = no_heartbeat,
) -> Metrics:
    """The `METRICS` that the data set has truth for, at the network's own setting."""
    return held_out_grid(network, dataset, spec, VariantSettings(), device, loaders, heartbeat)[0]


@torch.no_grad()
def held_out_grid(
    network: MultiGrain,
    dataset: Dataset,
    spec: MultiGrainSpec,
    wanted: VariantSettings,
    device: torch.device,
    loaders: int = 0,
    heartbeat: Heartbeat = no_heartbeat,
) -> tuple[Metrics, dict[str, Metrics]]:
    """The `METRICS` that the data set has truth for: at the network's own setting, and at all others of a grid.

    Each image passes through the trunk once for each size: at the network's own it is shown as its settings say, at
    others whole (`rect`) [R], as when a trained network is evaluated on benchmarks, or served. The classifier reads
    the embedding as it is pooled, whitened descriptors or not: a whitening leaves the order of the classes as it is.

    With a process group, every rank must call it. They share the embedding, rank 0 fits whitenings, all measure.

    Args:
        network: on `device`; it is left in evaluation mode.
        wanted: the grid, to which the network's own size and exponent are added.
        loaders: processes that read the files; 0: this one does.
        heartbeat: called between batches.
    Raises:
        EndedError: `heartbeat` was True on a rank.
    Returns:
        The metrics at the network's own setting, and at each other by its name, such as `s500-p4-whitened`. Where
        training images cannot be whitened, such as those that a network maps to one point, a warning says so.
    """
    own = Setting(spec.evaluation_size, max(1.0, float(network.pool.p)), False)  # a p that learns counts as 1 below 1
    exponents = tuple(dict.fromkeys((own.p, *wanted.exponents)))
    held_out = _held_out_images(dataset)
    images = (*held_out, *(_training_images(dataset) if wanted.whiten else ()))
    found: dict[str, Metrics] = {}
    for size in dict.fromkeys((own.size, *wanted.sizes)):
        transform = spec.evaluation.transform if size == own.size else "rect"
        embedded = embed.embed(network, images, size, transform, exponents, device, loaders, heartbeat=heartbeat)
        for p, embeddings in embedded.items():
            shown, training = np.split(embeddings, [len(held_out)])
            whitening = distributed.on_rank_zero(partial(_fitted, training)) if wanted.whiten else None
            for one in (None, whitening) if whitening else (None,):
                # By name, so that 2.2, and a p that was learnt and is 2.2 as fp32 has it, count as one.
                found[_name(Setting(size, p, one is not None))] = _measured(network, dataset, shown, one, device)
    return found.pop(_name(own)), found


def _name(at: Setting) -> str:
    """Such as `s500-p4-whitened`."""
    return f"s{at.name}".replace("/", "-")


def _held_out_images(dataset: Dataset) -> tuple[Path, ...]:
    """Those of the classes, then database and queries of the copy-detection set."""
    copies = dataset.copies
    return (*dataset.val, *(copies.database if copies else ()), *(copies.queries if copies else ()))


def _training_images(dataset: Dataset) -> list[Path]:
    """What a whitening is fitted on: the first image of each class, by name, then the second of each, and so on."""
    order = sorted(range(len(dataset.train)), key=lambda index: str(dataset.train[index]))
    seen: Counter[int] = Counter()
    turn = {}
    for index in order:
        label = dataset.train_labels[index]
        turn[index] = seen[label]
        seen[label] += 1
    return [dataset.train[index] for index in sorted(order, key=turn.__getitem__)[:WHITENED]]


def _fitted(embeddings: NDArray[np.float32]) -> Whitening | None:
    """A whitening that keeps as many directions as it can; None, with a warning, where there can be none."""
    count, channels = embeddings.shape
    try:
        return Whitening.fit(torch.from_numpy(embeddings), min(channels + 1, count - 1))
    except ValueError as error:
        warnings.warn(f"no metrics of whitened descriptors: {error}", stacklevel=2)
        return None


def _measured(
    network: MultiGrain,
    dataset: Dataset,
    embeddings: NDArray[np.float32],
    whitening: Whitening | None,
    device: torch.device,
) -> Metrics:
    """The metrics of embeddings (N, C) of the held-out images."""
    copies, labels = dataset.copies, np.array(dataset.val_labels)
    val = len(labels)
    logits = network.head(torch.from_numpy(embeddings[:val]).to(device)).logits.cpu().numpy()
    descriptors = embed.descriptors(embeddings, whitening)
    metrics = {"top1": float((logits.argmax(axis=1) == labels).mean())}
    if len(np.unique(labels)) < val:
        metrics["class_map"] = mean_average_precision(descriptors[:val], descriptors[:val], same_label(labels), device)
    if copies:
        database, queries = descriptors[val : val + len(copies.database)], descriptors[val + len(copies.database) :]
        truth = [Truth(np.array([original]), np.empty(0, np.int64)) for original in copies.truth]
        metrics["copy_map"] = mean_average_precision(queries, database, truth, device)
        metrics["mean_top1_copy_map"] = (metrics["top1"] + metrics["copy_map"]) / 2
    return metrics

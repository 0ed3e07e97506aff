"""Metrics of the held-out images of a data set, at the network's own setting and at others that cost no training."""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from multigrain import distributed
from multigrain.config.training import MultiGrainSpec, VariantSettings
from multigrain.data.dataset import Dataset
from multigrain.data.picture import Picture
from multigrain.evaluation import embed
from multigrain.evaluation.benchmark import Benchmark
from multigrain.evaluation.embed import Setting, SettingGrid
from multigrain.evaluation.measure import classify, retrieve
from multigrain.hooks import Heartbeat, no_heartbeat
from multigrain.models.multigrain import MultiGrain
from multigrain.models.whitening import Whitening
from multigrain.retrieval.metrics import Floats, Truth, same_label

METRICS = {
    "top1": "share of held-out images whose class is right",
    "class_map": "mAP of finding the other held-out images of a held-out image's class",
    "copy_map": "mAP of finding the original of a strongly distorted copy among originals and distractors",
    "mean_top1_copy_map": "mean of top1 and copy_map",
}
"""All in [0, 1], larger is better. The metrics with `copy` in their name need a copy-detection set."""
WHITENED = 20_000
"""Largest number of training images on which a whitening is fitted [R]."""

Metrics = dict[str, float]


def held_out_metrics(
    network: MultiGrain,
    dataset: Dataset,
    spec: MultiGrainSpec,
    device: torch.device,
    loaders: int = 0,
    heartbeat: Heartbeat = no_heartbeat,
) -> Metrics:
    """Return the `METRICS` for which the data set has truth, at the network's own setting."""
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
    """Return the `METRICS` for which the data set has truth, at the network's own setting and at all others of a grid.

    Each image passes through the trunk once for each size. At the network's own size it is shown as the network's
    settings say, at others whole (`rect`) [R], as in an evaluation on benchmarks and in serving. The classifier reads
    the embedding as it is pooled, also where descriptors are whitened.

    With a process group, every rank must call it. The ranks share images and queries; rank 0 fits whitenings.

    Args:
        network: on `device`; it is left in evaluation mode.
        wanted: the grid, to which the network's own size and exponent are added.
        loaders: processes that read the files; with 0, this process reads them.
        heartbeat: called between batches.
    Raises:
        EndedError: `heartbeat` returned True on a rank.
    Returns:
        The metrics at the network's own setting, and those at each other setting by its name, such as
        `s500-p4-whitened`. A warning says so where training images cannot be whitened, such as those that a network
        maps to one point.
    """
    grid = SettingGrid.of(network, spec, wanted.sizes, wanted.exponents)
    sets = benchmarks(dataset)
    held_out = _parts(sets)
    total = sum(map(len, held_out))
    images = [picture for part in held_out for picture in part]
    images += map(Picture, _training_images(dataset) if wanted.whiten else ())
    found: dict[Setting, Metrics] = {}
    for size in grid.sizes:
        transform = spec.evaluation.transform if size == grid.own.size else "rect"
        embedded = embed.embed(network, images, size, transform, grid.exponents, device, loaders, heartbeat=heartbeat)
        for p, embeddings in embedded.items():
            of_held_out, of_training = np.split(embeddings, [total])
            whitening = distributed.on_rank_zero(partial(_fitted, of_training)) if wanted.whiten else None
            for one in (None, whitening) if whitening else (None,):
                setting = Setting(size, p, one is not None)
                found[setting] = _measured(network, sets, of_held_out, one, device)
    own = found.pop(grid.own)
    return own, {f"s{setting.name}".replace("/", "-"): metrics for setting, metrics in found.items()}


def benchmarks(dataset: Dataset) -> list[Benchmark]:
    """Return the held-out images as benchmarks: `val` of classification, `class` and `copy` of retrieval."""
    val, labels = _pictures(dataset.val), dataset.val_labels
    found = [Benchmark("val", (), val, {}, ("top1",), labels)]
    if "class_map" in dataset.metrics:
        found.append(Benchmark("class", val, val, {"": tuple(same_label(np.array(labels)))}, ("map",)))
    if copies := dataset.copies:
        truth = tuple(Truth(np.array([original]), np.empty(0, np.int64)) for original in copies.truth)
        found.append(Benchmark("copy", _pictures(copies.database), _pictures(copies.queries), {"": truth}, ("map",)))
    return found


def _pictures(paths: tuple[Path, ...]) -> tuple[Picture, ...]:
    return tuple(map(Picture, paths))


def _parts(sets: list[Benchmark]) -> list[tuple[Picture, ...]]:
    """Return the databases and the lists of queries of some benchmarks, equal ones once."""
    return [*dict.fromkeys(part for one in sets for part in (one.database, one.queries) if part)]


def _training_images(dataset: Dataset) -> list[Path]:
    """Images to fit a whitening on: the first image of each class, by name, then the second of each, and so on."""
    turns: dict[int, Iterator[int]] = defaultdict(count)
    by_name = sorted(zip(dataset.train, dataset.train_labels, strict=True), key=lambda pair: str(pair[0]))
    in_turn = sorted(((next(turns[label]), path) for path, label in by_name), key=lambda pair: pair[0])
    return [path for _, path in in_turn[:WHITENED]]


def _fitted(embeddings: NDArray[np.float32]) -> Whitening | None:
    """Fit a whitening that keeps as many directions as possible; None, with a warning, where none can be fitted."""
    count, channels = embeddings.shape
    try:
        return Whitening.fit(torch.from_numpy(embeddings), min(channels + 1, count - 1))
    except ValueError as error:
        warnings.warn(f"no metrics of whitened descriptors: {error}", stacklevel=2)
        return None


def _measured(
    network: MultiGrain,
    sets: list[Benchmark],
    embeddings: NDArray[np.float32],
    whitening: Whitening | None,
    device: torch.device,
) -> Metrics:
    """Compute the metrics from the embeddings (N, C) of the images of all `_parts`."""
    parts = _parts(sets)
    ends = np.cumsum([len(part) for part in parts])[:-1]
    pooled = dict(zip(parts, np.split(embeddings, ends), strict=True))
    described = dict(zip(parts, np.split(embed.descriptors(embeddings, whitening), ends), strict=True))
    scores: dict[str, Floats] = {}
    for one in sets:
        if one.labels is not None:
            scores |= classify(one, network, pooled[one.queries], device)
        else:
            found = retrieve(one, "", described[one.database], described[one.queries], device)
            scores |= {f"{one.name}_{measure}": values for measure, values in found.values.items()}
    metrics = {name: float(values.mean()) for name, values in scores.items()}
    if "copy_map" in metrics:
        metrics["mean_top1_copy_map"] = (metrics["top1"] + metrics["copy_map"]) / 2
    return metrics

"""Scores of registered versions: stored with each version, one per query, and compared by a paired bootstrap."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mlflow import MlflowClient

from grainmill.registry.models import Version
from grainmill.trainable import QueryScores

DRAWS = 2000
"""Number of bootstrap samples."""


class Difference(NamedTuple):
    """Mean of paired differences between two versions, and its 95 % interval from `low` to `high`."""

    mean: float
    low: float
    high: float


def difference(challenger: Sequence[float], champion: Sequence[float]) -> Difference:
    """Compare scores (N,) of two versions on the same N queries, by the percentile bootstrap over queries."""
    paired = np.asarray(challenger, np.float64) - np.asarray(champion, np.float64)
    generator = np.random.default_rng(0)
    step = max(1, 2**22 // len(paired))  # bounds the memory of one batch of draws
    sizes = [(min(step, DRAWS - start), len(paired)) for start in range(0, DRAWS, step)]
    means = np.concatenate([paired[generator.integers(len(paired), size=size)].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(paired.mean()), float(low), float(high))


class StoredScores(NamedTuple):
    """Scores of one version in one metric, as stored with the version."""

    data: str
    """Digest of the evaluated data; only scores with equal digests can be compared."""
    values: Sequence[float]
    """Scores of the queries; larger is better."""

    @property
    def mean(self) -> float:
        """Value of the metric."""
        return float(np.mean(self.values))


def save(client: MlflowClient, version: Version, run_id: str, samples: Sequence[QueryScores]) -> None:
    """Store the samples of an evaluation of a version among the artifacts of its run, one JSON file per metric."""
    for sample in samples:
        text = json.dumps({"name": sample.name, "data": sample.data, "values": list(sample.values)})
        client.log_text(run_id, text, f"{_folder(version)}/{sample.name.replace('/', '--')}.json")


def load(client: MlflowClient, version: Any) -> dict[str, StoredScores]:
    """Read the stored scores of an MLflow model version, by metric."""
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        for item in client.list_artifacts(version.run_id, _folder(Version.of(version))):
            stored = json.loads(Path(client.download_artifacts(version.run_id, item.path, folder)).read_text())
            scores[stored["name"]] = StoredScores(stored["data"], stored["values"])
    return scores


def _folder(version: Version) -> str:
    return f"evidence/{version.number}"

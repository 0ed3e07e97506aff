"""What evaluations have measured of registered versions, value by value, kept to compare them by."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mlflow import MlflowClient
from numpy.typing import NDArray

from grainmill.registry.models import Version
from grainmill.trainable import QueryScores

DRAWS = 2000
"""Samples of the bootstrap."""


class Difference(NamedTuple):
    """By how much one mean is larger than another."""

    mean: float
    low: float
    high: float
    """Ends of the 95 % interval."""


def difference(challenger: Sequence[float], champion: Sequence[float]) -> Difference:
    """The mean of paired differences, (N,) and (N,), and its bootstrap interval over queries: the 2.5 % percentiles."""
    paired = np.asarray(challenger, np.float64) - np.asarray(champion, np.float64)
    generator, step = np.random.default_rng(0), max(1, 2**22 // len(paired))
    draws = [_means(paired, generator, min(step, DRAWS - start)) for start in range(0, DRAWS, step)]
    low, high = np.quantile(np.concatenate(draws), [0.025, 0.975])
    return Difference(float(paired.mean()), float(low), float(high))


def _means(paired: NDArray[np.float64], generator: np.random.Generator, draws: int) -> NDArray[np.float64]:
    return paired[generator.integers(len(paired), size=(draws, len(paired)))].mean(axis=1)


class StoredScores(NamedTuple):
    """A sample, as it is kept with a version."""

    data: str
    values: Sequence[float]

    @property
    def mean(self) -> float:
        """The metric."""
        return float(np.mean(self.values))


def save(client: MlflowClient, version: Version, run_id: str, samples: Sequence[QueryScores]) -> None:
    """Keep what an evaluation has measured of a version, among the artifacts of its run."""
    for one in samples:
        text = json.dumps({"name": one.name, "data": one.data, "values": list(one.values)})
        client.log_text(run_id, text, f"{_folder(version)}/{_file(one.name)}")


def _folder(version: Version) -> str:
    return f"evidence/{version.number}"


def _file(metric: str) -> str:
    return f"{metric.replace('/', '--')}.json"


def load(client: MlflowClient, version: Any) -> dict[str, StoredScores]:
    """What is kept of a version, by metric."""
    known = Version(version.name, str(version.version))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for item in client.list_artifacts(version.run_id, _folder(known)):
            told = json.loads(Path(client.download_artifacts(version.run_id, item.path, folder)).read_text())
            found[told["name"]] = StoredScores(told["data"], told["values"])
    return found

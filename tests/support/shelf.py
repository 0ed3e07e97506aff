"""A registered model whose versions have measurements, but no files."""

import numpy as np
import toy
from mlflow import MlflowClient

from grainmill.registry import comparison, promotion
from grainmill.registry.models import Version
from grainmill.tracking.mlflow_runs import PARENT

METRIC = "copies/map"


GATE = [f"metric={METRIC}"]


class Shelf:
    """A registered model whose versions have scores, but no files."""

    name = "apples"

    def __init__(self, uri):
        self.uri, self.notes, self.client = uri, [], MlflowClient(uri)

    @classmethod
    def new(cls, uri):
        self = cls(uri)
        self.client.create_registered_model(self.name)
        self.experiment = self.client.create_experiment("runs")
        return self

    def add(self, *values, data="the same", metric=METRIC, parent=None):
        """Add a version with one score for each query, and return it."""
        info = self.client.create_run(self.experiment, tags={PARENT: parent} if parent else {}).info
        run_id = info.run_id
        made = self.client.create_model_version(self.name, f"{info.artifact_uri}/model", run_id)
        version = Version(self.name, str(made.version))
        if values:
            comparison.save(self.client, version, run_id, [toy.QueryScores(metric, data, list(values), served=False)])
        return version

    def crown(self, number):
        self.client.set_registered_model_alias(self.name, "champion", number)

    def promote(self, number, gates=GATE):
        return promotion.promote(self.uri, f"models:/{self.name}/{number}", gates, self.notes.append)

    def rollback(self):
        return promotion.rollback(self.uri, self.name, self.notes.append)

    def aliases(self):
        return {key: int(one) for key, one in self.client.get_registered_model(self.name).aliases.items()}

    def history(self, number):
        """Return the recorded decisions on a version, the oldest first."""
        tags = self.client.get_model_version(self.name, str(number)).tags
        return [tags[key] for key in sorted(tags) if key.startswith("promotion.0")]


def spread(mean, count=40, seed=0):
    return np.random.default_rng(seed).normal(mean, 0.1, count).clip(0, 1).tolist()

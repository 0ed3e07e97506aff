"""Models of the toy: trained in a folder, registered, and evaluated."""

import pytest
import toy
from mlflow_tables import database
from toy_settings import CARD

from grainmill.registry import models
from grainmill.tracking.mlflow_runs import Tracker, local_uri
from grainmill.workflows import evaluate


@pytest.fixture
def scale(tmp_path):
    (tmp_path / "scale.txt").write_text("2")
    return f"on.scale={tmp_path / 'scale.txt'}"


def trained(folder):
    list(toy.fit(toy.Spec(height=0.25), toy.Data(), folder))
    return folder


def run(model, overrides, tmp_path, trainable="toy", **workers):
    return evaluate.evaluate(str(model), overrides, trainable, tmp_path / "out", local_uri(tmp_path), **workers)


def registered(tmp_path):
    """Register a model of the toy as models:/apples@champion, and return its tracker and its run id."""
    tracker = Tracker(database(tmp_path), "apples", tmp_path)
    run_id = tracker.start("first", {})
    folder = trained(tmp_path / "model")
    models.register(tracker, run_id, "apples", folder, toy.example(toy.Data()), {"score": "0.25"}, CARD)
    return tracker, run_id

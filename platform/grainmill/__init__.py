"""Grainmill trains, tunes and ships image embeddings on Ray, and records them in MLflow.

    import grainmill as gm

    experiment = gm.load("my.yaml", {"base.epochs": 3})
    outcome = gm.tune(experiment)
    gm.embed(outcome.version, "photos", "index", tracking_uri=outcome.tracking_uri)
    pairs = gm.duplicates("index").pairs

Importing it loads neither torch, Ray nor MLflow. The functions are described in `grainmill.api`.
"""

from grainmill.api import duplicates, embed, evaluate, find, load, promote, rollback, train, tune
from grainmill.errors import (
    BusyError,
    CorpusError,
    EvaluationError,
    ExperimentError,
    GrainmillError,
    NameTakenError,
    PromotionError,
    ResourceError,
    SearchError,
    ServingError,
    SourceError,
    StorageError,
    SubmissionError,
    TrackingError,
)

__all__ = [
    "BusyError",
    "CorpusError",
    "EvaluationError",
    "ExperimentError",
    "GrainmillError",
    "NameTakenError",
    "PromotionError",
    "ResourceError",
    "SearchError",
    "ServingError",
    "SourceError",
    "StorageError",
    "SubmissionError",
    "TrackingError",
    "duplicates",
    "embed",
    "evaluate",
    "find",
    "load",
    "promote",
    "rollback",
    "train",
    "tune",
]

"""Registered models of the trainable `shades`, and indexes of images made with them."""

import json
from contextlib import nullcontext

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shades
from mlflow_tables import database

from grainmill import trainable
from grainmill.corpus import embed as corpus
from grainmill.corpus import index
from grainmill.tracking.mlflow_runs import Tracker


@pytest.fixture(scope="session")
def shades_registry(tmp_path_factory):
    """The tracking URI, and the URIs of two versions of an embedding model."""
    folder = tmp_path_factory.mktemp("registry")
    tracker = Tracker(database(folder), "shades", folder)
    return tracker.uri, [shades.register(tracker, folder / str(bias), bias) for bias in (1, 2)]


def embed(registered, images, out, version=0, workers=1):
    return corpus.embed(registered[0], registered[1][version], str(images), out, workers, None, trainable.no_progress)


def answers_here(images, names, tracking_uri, identity, workers):
    """Stands in for `corpus._answers`, without Ray."""
    worker = corpus._Worker(images, tracking_uri, identity)
    for start in range(0, len(names), corpus.BLOCK):
        yield worker(pa.table({"id": names[start : start + corpus.BLOCK]}))


def do_without_ray(monkeypatch):
    """Embed in this process."""
    monkeypatch.setattr(corpus, "connect", nullcontext)
    monkeypatch.setattr(corpus, "_answers", answers_here)


def rows(out):
    return pa.concat_tables([pq.read_table(path) for path in index.parts(out)]).to_pylist()


def expected(folder, name, bias=1):
    """Return the embedding of one image, computed by the predictor directly."""
    state = folder / "state"
    state.mkdir(exist_ok=True)
    (state / "state.json").write_text(json.dumps({"bias": bias}))
    return shades.load(state)(pd.DataFrame({"image": [name.read_bytes()]}))["embedding"][0]

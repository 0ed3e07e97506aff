"""Embedding a corpus on real Ray: what is in the index, what is skipped, and what a crash leaves."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shades
from commands import PYTHON_PATH, left_behind

from grainmill import trainable
from grainmill.corpus import embed as corpus
from grainmill.corpus import index
from grainmill.errors import BusyError, CorpusError, ResourceError, TrackingError
from grainmill.tracking.mlflow_runs import Tracker, local_uri


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Two versions of a model that embeds, and the tracking URI."""
    folder = tmp_path_factory.mktemp("registry")
    tracker = Tracker(local_uri(folder), "shades", folder)
    return tracker.uri, [shades.register(tracker, folder / str(bias), bias) for bias in (1, 2)]


def embed(registered, images, out, version=0, workers=1):
    return corpus.embed(registered[0], registered[1][version], str(images), out, workers, None, trainable.no_progress)


def rows(out):
    return pa.concat_tables([pq.read_table(path) for path in index.parts(out)]).to_pylist()


def expected(folder, name, bias=1):
    """The embedding of one image, by the predictor itself."""
    state = folder / "state"
    state.mkdir(exist_ok=True)
    (state / "state.json").write_text(json.dumps({"bias": bias}))
    return shades.load(state)(pd.DataFrame({"image": [name.read_bytes()]}))["embedding"][0]


@pytest.mark.slow
def test_every_image_is_in_the_index_once_and_what_is_none_is_listed(ray_cluster, registered, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 8)
    names = shades.write_images(tmp_path / "images", 30)
    (tmp_path / "images" / "bad.png").write_text("<html>")
    (tmp_path / "images" / "gone.png").symlink_to("nowhere")
    done = embed(registered, tmp_path / "images", tmp_path / "index", workers=2)
    assert (done.images, done.before, done.faults) == (30, 0, 2)
    found = {row["id"]: row for row in rows(tmp_path / "index")}
    assert sorted(found) == names
    for name, row in found.items():
        assert row["embedding"] == pytest.approx(expected(tmp_path, tmp_path / "images" / name), abs=1e-6)
        assert (row["class"], row["score"]) == ("shade", 0.5)
    with done.skipped.open() as file:
        listed = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert listed == {"bad.png": "is not an image", "gone.png": "cannot be read (No such file or directory)"}
    schema = pq.read_schema(index.parts(tmp_path / "index")[0])
    assert schema.field("embedding").type == pa.list_(pa.float32(), shades.DIMENSION)
    record = json.loads((tmp_path / "index" / "index.json").read_text())
    assert json.loads(schema.metadata[b"grainmill"]) == record
    assert (record["model"], record["dimension"]) == (registered[1][0], shades.DIMENSION)

    # Again: what was repaired and what is new comes in, nothing else is touched.
    before = {path: path.read_bytes() for path in index.parts(tmp_path / "index")}
    (tmp_path / "images" / "bad.png").write_bytes((tmp_path / "images" / names[0]).read_bytes())
    (tmp_path / "images" / "gone.png").unlink()
    done = embed(registered, tmp_path / "images", tmp_path / "index")
    assert (done.images, done.before, done.skipped) == (31, 30, None)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(row["id"] for row in rows(tmp_path / "index")) == [*names, "bad.png"]
    assert not (tmp_path / "index" / "skipped.csv").exists()


COMMAND = """
from grainmill.corpus import embed as corpus
corpus.BLOCK, corpus.PART_ROWS = 10, 20
from grainmill.cli.app import app
app()
"""


@pytest.mark.slow
def test_after_a_kill_nothing_is_half_written_lost_or_embedded_twice(registered, tmp_path, monkeypatch):
    names = shades.write_images(tmp_path / "images", 60)
    os.mkfifo(tmp_path / "images" / "99999.png")  # whoever reads it waits
    mark, out = str(uuid.uuid4()), tmp_path / "index"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": registered[0], "GRAINMILL_TEST": mark}
    environment["PYTHONPATH"] = PYTHON_PATH
    command = [sys.executable, "-c", COMMAND, "embed", registered[1][0], str(tmp_path / "images"), "--out", str(out)]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while len(index.parts(out)) < 3:  # all that comes before the pipe; none waits for what comes after
        assert first.poll() is None, first.stdout.read().decode()
        assert time.monotonic() < deadline
    with pytest.raises(BusyError):
        embed(registered, tmp_path / "images", out)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    os.close(os.open(tmp_path / "images" / "99999.png", os.O_RDWR))  # lets a reader go that the kill has left
    (out / "part.draft").write_bytes(b"PAR1 half of a file")  # as if it had been killed in the middle of another
    before = {path: path.read_bytes() for path in index.parts(out)}
    kept = {row["id"] for row in rows(out)}
    assert kept == set(names)
    assert left_behind(mark) == []

    (tmp_path / "images" / "99999.png").unlink()
    shades.write_images(tmp_path / "more", 1, seed=9)
    (tmp_path / "more" / "00000.png").rename(tmp_path / "images" / "99999.png")
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"61 images in {out}, {len(kept)} of them from before" in told
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(row["id"] for row in rows(out)) == [*names, "99999.png"]
    assert not (out / "part.draft").exists()


def test_an_index_is_of_one_model_and_one_source(registered, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_answers", answers_here)
    for name in ("images", "others"):
        shades.write_images(tmp_path / name, 3)
    embed(registered, tmp_path / "images", tmp_path / "index")
    with pytest.raises(CorpusError, match=r"is of models:/shades/1 \(49 dim.*got models:/shades/2 .*embed the images"):
        embed(registered, tmp_path / "images", tmp_path / "index", version=1)
    with pytest.raises(CorpusError, match=r"one source, but .*images, got .*others; name another with --out"):
        embed(registered, tmp_path / "others", tmp_path / "index")


def answers_here(images, names, tracking_uri, identity, workers):
    """What `corpus._answers` gives, without Ray."""
    yield corpus._Worker(images, tracking_uri, identity)(pa.table({"id": names}))


def test_what_cannot_be_embedded_is_told_before_anything_starts(registered, tmp_path, monkeypatch):
    uri, (model, _) = registered
    out = tmp_path / "index"

    def fails(model, source, kind, words, place=out):
        with pytest.raises(kind, match=words):
            corpus.embed(uri, model, str(source), place, 1, None, trainable.no_progress)

    fails(model, tmp_path / "nowhere", CorpusError, "there is no folder .*nowhere")
    (tmp_path / "empty").mkdir()
    fails(model, tmp_path / "empty", CorpusError, "must hold images, but none")
    fails("models:/shades/7", tmp_path, TrackingError, "must be in the registry")
    fails("models:/pears@champion", tmp_path, TrackingError, "must be in the registry")
    fails("runs/demo", tmp_path, CorpusError, "a model must be registered.*got runs/demo")
    shades.write_images(tmp_path / "images", 2)
    fails(model, tmp_path / "images", CorpusError, "a folder of its own, but .*images holds other", tmp_path / "images")
    (tmp_path / "file").write_text("")
    fails(model, tmp_path / "images", CorpusError, "a folder to write in", tmp_path / "file")
    assert not out.exists()

    monkeypatch.setattr(corpus, "_answers", answers_here)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    fails(model, tmp_path / "broken", CorpusError, "of 1 none is: a.png is not an image")


def test_more_workers_than_the_cluster_has_cpus_are_refused(ray_cluster):
    with pytest.raises(ResourceError, match="3 workers need 3 CPU"):
        corpus._share(3)
    assert [corpus._share(workers) for workers in (1, 2)] == [
        {"num_cpus": 2, "num_gpus": 0},
        {"num_cpus": 1, "num_gpus": 0},
    ]


def test_a_name_that_is_not_text_is_skipped_and_listed(registered, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_answers", answers_here)
    shades.write_images(tmp_path / "images", 2)
    os.link(tmp_path / "images" / "00000.png", os.fsencode(tmp_path / "images") + b"/\xff.png")
    done = embed(registered, tmp_path / "images", tmp_path / "index")
    assert (done.images, done.faults) == (2, 1)
    assert done.skipped.read_text().splitlines()[1] == "\\udcff.png,has a name that is not text"


def test_a_damaged_or_foreign_file_of_an_index_is_told(registered, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_answers", answers_here)
    shades.write_images(tmp_path / "images", 3)
    for version in (0, 1):
        embed(registered, tmp_path / "images", tmp_path / str(version), version)
    one, other = (index.parts(tmp_path / str(version))[0] for version in (0, 1))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    with pytest.raises(CorpusError, match=r"of one model, but .*000000.parquet is of models:/shades/2"):
        index.Index(tmp_path / "0")
    one.write_bytes(content[:-20])
    with pytest.raises(CorpusError, match=r"must be whole, but .*000000.parquet is not.*delete it"):
        index.Index(tmp_path / "0")
    one.unlink()
    assert embed(registered, tmp_path / "images", tmp_path / "0").images == 3
    with pytest.raises(CorpusError, match=r"`grainmill embed` made, but .*images is none"):
        index.Index(tmp_path / "images")


def test_blocks_begin_where_they_are_asked_to(registered, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_answers", answers_here)
    monkeypatch.setattr(index, "GROUP", 4)
    names = shades.write_images(tmp_path / "images", 10)
    embed(registered, tmp_path / "images", tmp_path / "index")
    made = index.Index(tmp_path / "index")
    assert [(block.start, block.ids) for block in made.blocks()] == [(0, names[:4]), (4, names[4:8]), (8, names[8:])]
    assert [block.start for block in made.blocks(5)] == [4, 8]
    found = np.concatenate([block.embeddings for block in made.blocks()])
    whole = [expected(tmp_path, tmp_path / "images" / name) for name in names]
    np.testing.assert_allclose(found, whole, atol=1e-6)
    assert list(made.ids()) == names
    assert len(made) == 10

"""Embedding a folder on real Ray: every image once, and after a kill."""

import csv
import os
import signal
import subprocess
import sys
import time
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shades
from commands import left_behind, python_path
from shade_index import embed, expected, rows

from grainmill.corpus import embed as corpus
from grainmill.corpus import index, index_writer
from grainmill.errors import BusyError


def test_every_image_is_in_the_index_once_and_what_is_none_is_listed(
    ray_cluster, shades_registry, tmp_path, monkeypatch
):
    monkeypatch.setattr(corpus, "BLOCK", 8)
    names = shades.write_images(tmp_path / "images", 30)
    (tmp_path / "images" / "bad.png").write_text("<html>")
    (tmp_path / "images" / "gone.png").symlink_to("nowhere")
    done = embed(shades_registry, tmp_path / "images", tmp_path / "index", workers=2)
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
    made = index.IndexRecord.read(tmp_path / "index")
    assert schema.metadata[b"grainmill"].decode() == made.identity
    assert (made.model.model, made.model.dimension) == (shades_registry[1][0], shades.DIMENSION)

    # Again: what was repaired and what is new comes in, nothing else is touched.
    before = {path: path.read_bytes() for path in index.parts(tmp_path / "index")}
    (tmp_path / "images" / "bad.png").write_bytes((tmp_path / "images" / names[0]).read_bytes())
    (tmp_path / "images" / "gone.png").unlink()
    done = embed(shades_registry, tmp_path / "images", tmp_path / "index")
    assert (done.images, done.before, done.skipped) == (31, 30, None)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(row["id"] for row in rows(tmp_path / "index")) == [*names, "bad.png"]
    assert not (tmp_path / "index.reports" / "skipped.csv").exists()


COMMAND = """
from grainmill.corpus import embed as corpus
corpus.BLOCK, corpus.PART_ROWS = 10, 20
from grainmill.cli.app import app
app()
"""


def test_after_a_kill_nothing_is_half_written_lost_or_embedded_twice(shades_registry, tmp_path, monkeypatch):
    names = shades.write_images(tmp_path / "images", 60)
    os.mkfifo(tmp_path / "images" / "99999.png")  # whoever reads it waits
    mark, out = str(uuid.uuid4()), tmp_path / "index"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": shades_registry[0], "GRAINMILL_TEST": mark}
    environment["PYTHONPATH"] = python_path()
    command = [
        sys.executable,
        "-c",
        COMMAND,
        "embed",
        shades_registry[1][0],
        str(tmp_path / "images"),
        "--out",
        str(out),
    ]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while len(index.parts(out)) < 3:  # all that comes before the pipe; none waits for what comes after
        assert first.poll() is None, first.stdout.read().decode()
        assert time.monotonic() < deadline
    with pytest.raises(BusyError):
        embed(shades_registry, tmp_path / "images", out)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    os.close(os.open(tmp_path / "images" / "99999.png", os.O_RDWR))  # lets a reader go that the kill has left
    draft = out / index_writer.DRAFT
    draft.write_bytes(b"PAR1 half of a file")  # as if it had been killed in the middle of another
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
    assert not draft.exists()

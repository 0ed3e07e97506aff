"""Embedding a corpus without Ray: what is refused, what is skipped, and how an index is read."""

import os
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pytest
import shades
from shade_index import embed, expected

from grainmill import trainable
from grainmill.corpus import embed as corpus
from grainmill.corpus import index
from grainmill.errors import CorpusError, ResourceError, TrackingError


def test_an_index_is_of_one_model_and_one_source(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    for name in ("images", "others"):
        shades.write_images(tmp_path / name, 3)
    embed(shades_registry, tmp_path / "images", tmp_path / "index")
    with pytest.raises(CorpusError, match=r"is of models:/shades/1 \(49 dim.*got models:/shades/2 .*embed the images"):
        embed(shades_registry, tmp_path / "images", tmp_path / "index", version=1)
    with pytest.raises(CorpusError, match=r"one source, but .*images, got .*others; name another with --out"):
        embed(shades_registry, tmp_path / "others", tmp_path / "index")


def do_without_ray(monkeypatch):
    monkeypatch.setattr(corpus, "connect", nullcontext)
    monkeypatch.setattr(corpus, "_answers", answers_here)


def answers_here(images, names, tracking_uri, identity, workers):
    """Stands in for `corpus._answers`, without Ray."""
    yield corpus._Worker(images, tracking_uri, identity)(pa.table({"id": names}))


def test_what_cannot_be_embedded_is_told_before_anything_starts(shades_registry, tmp_path, monkeypatch):
    uri, (model, _) = shades_registry
    out = tmp_path / "index"

    def fails(model, source, kind, words, place=out):
        with pytest.raises(kind, match=words):
            corpus.embed(uri, model, str(source), place, 1, None, trainable.no_progress)

    fails(model, tmp_path / "nowhere", CorpusError, "there is no folder .*nowhere")
    (tmp_path / "empty").mkdir()
    fails(model, tmp_path / "empty", CorpusError, "must hold images, but none")
    (tmp_path / "empty" / "a.jp2").touch()
    words = "must hold images, but none were found there, only a.jp2, which is of a type that is not read; name"
    fails(model, tmp_path / "empty", CorpusError, words)
    fails("models:/shades/7", tmp_path, TrackingError, "must be in the registry")
    fails("models:/pears@champion", tmp_path, TrackingError, "must be in the registry")
    fails("runs/demo", tmp_path, CorpusError, "a model must be registered.*got runs/demo")
    shades.write_images(tmp_path / "images", 2)
    fails(model, tmp_path / "images", CorpusError, "a folder of its own, but .*images holds other", tmp_path / "images")
    (tmp_path / "file").write_text("")
    fails(model, tmp_path / "images", CorpusError, "a folder to write in", tmp_path / "file")
    assert not out.exists()

    do_without_ray(monkeypatch)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    fails(model, tmp_path / "broken", CorpusError, "of 1 none is: a.png is not an image")


def test_more_workers_than_the_cluster_has_cpus_are_refused(monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(ResourceError, match="3 workers need 3 CPU"):
        corpus._share(3)
    assert [corpus._share(workers) for workers in (1, 2)] == [
        {"num_cpus": 2, "num_gpus": 0},
        {"num_cpus": 1, "num_gpus": 0},
    ]


def test_a_name_that_is_not_text_is_skipped_and_listed(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    shades.write_images(tmp_path / "images", 2)
    os.link(tmp_path / "images" / "00000.png", os.fsencode(tmp_path / "images") + b"/\xff.png")
    done = embed(shades_registry, tmp_path / "images", tmp_path / "index")
    assert (done.images, done.faults) == (2, 1)
    assert done.skipped.read_text().splitlines()[1] == "\\udcff.png,has a name that is not text"


def test_a_damaged_or_foreign_file_of_an_index_is_told(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    shades.write_images(tmp_path / "images", 3)
    for version in (0, 1):
        embed(shades_registry, tmp_path / "images", tmp_path / str(version), version)
    one, other = (index.parts(tmp_path / str(version))[0] for version in (0, 1))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    with pytest.raises(CorpusError, match=r"of one model, but .*000000.parquet is of models:/shades/2"):
        index.Index(tmp_path / "0")
    one.write_bytes(content[:-20])
    with pytest.raises(CorpusError, match=r"must be whole, but .*000000.parquet is not.*delete it"):
        index.Index(tmp_path / "0")
    one.unlink()
    assert embed(shades_registry, tmp_path / "images", tmp_path / "0").images == 3
    with pytest.raises(CorpusError, match=r"`grainmill embed` made, but .*images is none"):
        index.Index(tmp_path / "images")


def test_blocks_begin_where_they_are_asked_to(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    monkeypatch.setattr(index, "GROUP", 4)
    names = shades.write_images(tmp_path / "images", 10)
    embed(shades_registry, tmp_path / "images", tmp_path / "index")
    made = index.Index(tmp_path / "index")
    assert [(start, len(rows)) for start, rows in made.blocks()] == [(0, 4), (4, 4), (8, 2)]
    assert [start for start, _ in made.blocks(5)] == [4, 8]
    found = np.concatenate([rows for _, rows in made.blocks()])
    whole = [expected(tmp_path, tmp_path / "images" / name) for name in names]
    np.testing.assert_allclose(found, whole, atol=1e-6)
    assert list(made.ids()) == names
    assert len(made) == 10


def test_files_that_are_left_out_are_listed_with_those_that_cannot_be_read(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    shades.write_images(tmp_path / "images", 2)
    (tmp_path / "images" / "a.jp2").touch()
    (tmp_path / "images" / "b.png").write_text("<html>")
    done = embed(shades_registry, tmp_path / "images", tmp_path / "index")
    assert (done.images, done.faults) == (2, 2)
    assert done.skipped.read_text() == "id,reason\na.jp2,is of a type that is not read\nb.png,is not an image\n"

"""Embedding a corpus without Ray: what is refused, what is skipped, and how an index is read."""

import hashlib
import os

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
import shades
from shade_index import do_without_ray, embed, expected, rows

from grainmill import trainable
from grainmill.corpus import embed as corpus
from grainmill.corpus import index, index_writer, source
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


@pytest.mark.parametrize("spelling", ["images", "images/", "./images", "../here/images", "link", "{home}/images"])
def test_one_source_in_any_spelling(shades_registry, tmp_path, monkeypatch, spelling):
    do_without_ray(monkeypatch)
    home = tmp_path / "here"
    shades.write_images(home / "images", 2)
    shades.write_images(tmp_path / "there" / "images", 2)
    (home / "link").symlink_to("images")
    monkeypatch.chdir(home)
    embed(shades_registry, "images", home / "index")
    assert embed(shades_registry, spelling.format(home=home), home / "index")[:2] == (2, 2)
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(CorpusError, match=r"one source, but .*here/images, got .*there/images"):
        embed(shades_registry, "images", home / "index")


def test_a_manifest_is_known_by_the_name_of_its_link_and_a_prefix_without_slash(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    (tmp_path / "link.csv").symlink_to("lists/a.csv")
    (tmp_path / "folder").symlink_to("lists")
    monkeypatch.chdir(tmp_path)
    assert source.canonical("link.csv") == f"{tmp_path}/link.csv"
    assert source.canonical("folder/a.csv") == f"{tmp_path}/lists/a.csv"
    assert source.canonical("s3://bucket/photos/") == "s3://bucket/photos"


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


def test_a_file_of_an_index_that_was_changed_is_told_and_made_again(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    monkeypatch.setattr(corpus, "BLOCK", 2)
    monkeypatch.setattr(corpus, "PART_ROWS", 2)
    out = tmp_path / "index"
    shades.write_images(tmp_path / "images", 6)
    embed(shades_registry, tmp_path / "images", out)
    embed(shades_registry, tmp_path / "images", tmp_path / "other", version=1)
    whole, other = rows(out), index.parts(tmp_path / "other")[0].read_bytes()

    def flip(part):
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)

    def change_record(part):
        record = part.with_name(index.RECORD)
        record.write_text(record.read_text().replace('"dimension": 49', '"dimension": 48'))

    damages = [
        (flip, r"/part-\d*.parquet is cut short or altered; the same `grainmill embed` repairs it"),
        (lambda part: part.write_bytes(part.read_bytes()[:-20]), r"/part-\d*.parquet is cut short or altered"),
        (lambda part: part.unlink(), r"/part-\d*.parquet is missing"),
        (lambda part: (part.unlink(), os.mkfifo(part)), r"/part-\d*.parquet is missing"),
        (lambda part: part.write_bytes(other), r"/part-\d*.parquet is cut short or altered"),
        (lambda part: part.with_name("part-000099.parquet").write_bytes(other), "part-000099.parquet is not of this"),
        (change_record, "an index must be a folder as `grainmill embed` wrote it.* was changed"),
        (lambda part: part.with_name(index.RECORD).write_text("{"), "a folder as `grainmill embed` wrote it"),
    ]
    for damage, told in damages:
        damage(index.parts(out)[1])
        with pytest.raises(CorpusError, match=told):
            index.Index(out)
        assert embed(shades_registry, tmp_path / "images", out).images == 6
        assert sorted(rows(out), key=lambda row: row["id"]) == whole


def test_a_folder_that_is_no_index_and_one_of_an_earlier_version_are_refused(shades_registry, tmp_path):
    shades.write_images(tmp_path / "images", 1)
    with pytest.raises(CorpusError, match=r"as `grainmill embed` wrote it, but .*images is none"):
        index.Index(tmp_path / "images")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "index.json").write_text("{}")
    for act in (
        lambda: index.Index(tmp_path / "old"),
        lambda: embed(shades_registry, tmp_path / "images", tmp_path / "old"),
    ):
        with pytest.raises(CorpusError, match="of an earlier version; delete it, and embed again"):
            act()


def test_a_file_that_a_crash_left_as_a_draft_gets_its_name(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    out = tmp_path / "index"
    shades.write_images(tmp_path / "images", 3)
    embed(shades_registry, tmp_path / "images", out)
    (part,) = index.parts(out)
    content = part.read_bytes()
    part.rename(out / index_writer.DRAFT)  # the record had it before its name
    monkeypatch.setattr(corpus, "_answers", None)
    assert embed(shades_registry, tmp_path / "images", out)[:2] == (3, 3)
    (out / index_writer.DRAFT).write_bytes(content[:99])
    assert embed(shades_registry, tmp_path / "images", out)[:2] == (3, 3)
    assert part.read_bytes() == content
    assert not (out / index_writer.DRAFT).exists()


def test_what_is_gone_is_dropped_and_what_changed_is_renewed(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    monkeypatch.setattr(corpus, "BLOCK", 2)
    monkeypatch.setattr(corpus, "PART_ROWS", 2)
    images, out = tmp_path / "images", tmp_path / "index"
    names = shades.write_images(images, 7)
    embed(shades_registry, images, out)
    shades.write_images(tmp_path / "others", 3, seed=1)
    for gone in names[:3]:  # a whole file of the index and half of another
        (images / gone).unlink()
    (tmp_path / "others" / names[0]).rename(images / names[4])
    (tmp_path / "others" / names[1]).rename(images / "new.png")
    (images / names[6]).write_text("no image any more")
    done = embed(shades_registry, images, out)
    assert (done.images, done.before, done.faults) == (4, 2, 1)
    found = {row["id"]: row["embedding"] for row in rows(out)}
    assert len(rows(out)) == len(found)
    assert sorted(found) == [*names[3:6], "new.png"]
    for name, embedding in found.items():
        assert embedding == pytest.approx(expected(tmp_path, images / name), abs=1e-6)


def test_blocks_begin_where_they_are_asked_to(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    monkeypatch.setattr(index_writer, "GROUP", 4)
    names = shades.write_images(tmp_path / "images", 10)
    embed(shades_registry, tmp_path / "images", tmp_path / "index")
    made = index.Index(tmp_path / "index")
    assert [(start, len(rows)) for start, rows in made.blocks()] == [(0, 4), (4, 4), (8, 2)]
    assert [start for start, _ in made.blocks(5)] == [4, 8]
    found = np.concatenate([rows for _, rows in made.blocks()])
    whole = [expected(tmp_path, tmp_path / "images" / name) for name in names]
    np.testing.assert_allclose(found, whole, atol=1e-6)
    assert list(made.column("id")) == names
    assert len(made) == 10


def test_files_that_are_left_out_are_listed_with_those_that_cannot_be_read(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    shades.write_images(tmp_path / "images", 2)
    (tmp_path / "images" / "a.jp2").touch()
    (tmp_path / "images" / "b.png").write_text("<html>")
    done = embed(shades_registry, tmp_path / "images", tmp_path / "index")
    assert (done.images, done.faults) == (2, 2)
    assert done.skipped.read_text() == "id,reason\na.jp2,is of a type that is not read\nb.png,is not an image\n"


def test_an_index_is_a_dataset_for_other_readers(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    monkeypatch.setattr(corpus, "BLOCK", 2)
    monkeypatch.setattr(corpus, "PART_ROWS", 2)
    out = tmp_path / "index"
    names = shades.write_images(tmp_path / "images", 5)
    (tmp_path / "images" / "=1.png").write_text("<html>")
    done = embed(shades_registry, tmp_path / "images", out)
    (out / index_writer.DRAFT).write_bytes(b"PAR1 half of a file")
    assert pd.read_parquet(out)["id"].tolist() == names
    table = ds.dataset(out).to_table()
    assert table.column_names == ["id", "embedding", "class", "score", "size", "version", "digest"]
    (row,) = table.filter(pc.field("id") == names[3]).to_pylist()
    image = tmp_path / "images" / names[3]
    assert (row["size"], row["version"]) == (image.stat().st_size, str(image.stat().st_mtime_ns))
    assert row["digest"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert done.skipped == tmp_path / "index.reports" / "skipped.csv"
    assert done.skipped.read_text().splitlines()[1] == "./=1.png,is not an image"


@pytest.mark.parametrize(
    ("steady", "seconds", "rate"), [(512, 4.0, 128), (256, 2.0, 128), (255, 4.0, None), (256, 1.9, None), (0, 0, None)]
)
def test_a_rate_is_told_where_it_was_measured(steady, seconds, rate):
    assert corpus.EmbedResult(600, 0, None, 0, seconds, steady).rate == rate

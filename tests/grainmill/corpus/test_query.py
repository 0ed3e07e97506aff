"""Nearest images and duplicates in an index: results, errors and pages."""

import base64
import csv
import functools
import io
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import shade_index
import shades
from mlflow_tables import database
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from shade_index import do_without_ray

from grainmill import trainable
from grainmill.corpus import duplicate_precision, embed, index
from grainmill.corpus import query as lookup
from grainmill.corpus.equal_images import EqualImages
from grainmill.errors import CorpusError
from grainmill.tracking.mlflow_runs import Tracker


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A registry with two models, 80 images of which the last 6 are copies, and an index of them by the first model."""
    folder = tmp_path_factory.mktemp("world")
    tracker = Tracker(database(folder), "shades", folder)
    models = [shades.register(tracker, folder / str(bias), bias) for bias in (0.1, 2)]
    names = shades.write_images(folder / "images", 80)
    for number in range(6):
        with Image.open(folder / "images" / names[number]) as image:
            pixels = np.asarray(image).astype(int)
        noisy = (pixels + np.random.default_rng(number).integers(-20, 21, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "images" / names[74 + number])
    monkeypatch = pytest.MonkeyPatch()
    do_without_ray(monkeypatch)
    monkeypatch.setattr(embed, "BLOCK", 50)
    embed.embed(tracker.uri, models[0], str(folder / "images"), folder / "index", 1, None, trainable.no_progress)
    monkeypatch.undo()
    return folder, tracker.uri, models, names


def find(world, *queries, model=0, count=5, folder=None, page="found.html"):
    home, uri, models, _ = world
    return lookup.find(uri, models[model], folder or home / "index", list(map(str, queries)), count, home / page)


def pictures(page):
    """Return the text and the pictures of a page; check that the page refers to no other file."""
    text = page.read_text()
    assert not re.search(r"(src|href)=(?!\"data:image/jpeg;base64,)", text)
    found = [base64.b64decode(one) for one in re.findall(r'data:image/jpeg;base64,([^"]+)"', text)]
    for content in found:
        Image.open(io.BytesIO(content)).load()
    return text, found


def test_the_nearest_images_are_found_and_shown(world):
    home, _, _, names = world
    images = home / "images"
    (home / "no image.txt").write_text("<b>")
    found = find(world, images / names[3], home / "no image.txt", images / names[60], images / "nowhere.png")
    made = index.Index(home / "index")
    rows = dict(zip(made.column("id"), np.concatenate([rows for _, rows in made.blocks()]), strict=True))
    for one, name in ((found[0], names[3]), (found[2], names[60])):
        scores = {other: float(rows[other] @ rows[name]) for other in names}
        expected = sorted(scores, key=scores.__getitem__, reverse=True)[:5]
        assert (one.ids, one.error) == (expected, None)
        assert one.scores == pytest.approx([scores[other] for other in expected], abs=1e-6)
    assert found[0].ids[:2] == [names[3], names[77]]
    assert (found[1].error, found[1].ids) == ("is not an image", [])
    assert found[3].error == "cannot be read (No such file or directory)"
    text, shown = pictures(home / "found.html")
    assert len(shown) == 2 * (1 + 5)
    assert all(f"{score:.4f}" in text for score in found[0].scores)


def test_a_page_lives_without_the_pictures_and_escapes_names(world, tmp_path):
    home, _, _, names = world
    query = tmp_path / "<script>.png"
    query.write_bytes((home / "images" / names[0]).read_bytes())
    (home / "images").rename(home / "away")
    try:
        with pytest.warns(match=r"cannot tell if .*index has the images as they are now: there is no folder"):
            (found,) = find(world, query)
    finally:
        (home / "away").rename(home / "images")
    assert found.ids[0] == names[0]
    text, shown = pictures(home / "found.html")
    assert len(shown) == 1, "the query itself"
    assert "&lt;script&gt;" in text
    assert "<script>" not in text


def test_an_index_of_another_model_or_none_is_refused(world, tmp_path):
    home, _, models, names = world
    query = home / "images" / names[0]
    with pytest.raises(CorpusError, match=rf"is of {models[0]} \(49 dimensions.* got {models[1]} .*; name {models[0]}"):
        find(world, query, model=1)
    with pytest.raises(CorpusError, match=r"as `grainmill embed` wrote it, but .* is none"):
        find(world, query, folder=tmp_path)
    made = index.IndexRecord.read(home / "index")
    other = made.model._replace(dimension=48)
    made._replace(model=other, parts={}).write(tmp_path)
    with pytest.raises(CorpusError, match="has none yet"):
        find(world, query, folder=tmp_path)
    with pytest.raises(CorpusError, match=r"\(48 dimensions.* \(49 dimensions"):
        index.check_model(tmp_path, other, made.model)
    with pytest.raises(CorpusError, match=r"a query must be an image, but none is:\n  .*nowhere cannot be read"):
        find(world, home / "nowhere")


def test_copies_are_listed_with_a_precision_and_shown(world, tmp_path):
    home, _, _, names = world
    found = lookup.duplicates(home / "index", 0.9, None, tmp_path)
    assert set(found.pairs) == {(names[number], names[74 + number]) for number in range(6)}
    assert found.scores == sorted(found.scores, reverse=True)
    assert min(found.precision) >= 0.9
    with (tmp_path / "duplicates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["first"], row["second"]) for row in rows] == found.pairs
    assert [float(row["score"]) for row in rows] == pytest.approx(found.scores, abs=1e-6)
    assert [float(row["precision"]) for row in rows] == pytest.approx(found.precision, abs=1e-4)
    assert len(pictures(tmp_path / "duplicates.html")[1]) == 12
    assert found.files == [tmp_path / name for name in ("duplicates.csv", "equal.csv", "duplicates.html")]


def test_a_threshold_lists_all_that_reach_it(world, tmp_path):
    made = index.Index(world[0] / "index")
    rows = np.concatenate([rows for _, rows in made.blocks()])
    expected = int((np.triu(rows @ rows.T, 1) >= 0.3).sum())
    found = lookup.duplicates(world[0] / "index", 0.9, 0.3, tmp_path)
    assert len(found.pairs) == expected > 6
    assert min(found.scores) >= 0.3
    assert not found.more
    assert found.precision[-1] < 0.9


def test_too_many_pairs_are_cut_and_that_is_told(world, tmp_path, monkeypatch):
    monkeypatch.setattr(lookup, "MOST", 10)
    found = lookup.duplicates(world[0] / "index", 0.9, -1.0, tmp_path)
    assert len(found.pairs) == 10
    assert found.more


def test_a_small_corpus_has_no_estimate(world, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicate_precision, "NEIGHBOURS", 80)
    with pytest.raises(
        CorpusError, match=r"needs more than 80 different images, but .*index has 80; give a --threshold"
    ):
        lookup.duplicates(world[0] / "index", 0.9, None, tmp_path)
    found = lookup.duplicates(world[0] / "index", 0.9, 0.9, tmp_path)
    assert found.precision == [None] * len(found.pairs)
    assert (tmp_path / "duplicates.csv").read_text().splitlines()[1].endswith(",")


def test_the_stand_in_has_what_a_trainable_needs():
    assert all(hasattr(shades, member) for member in trainable.REQUIRED)


def test_a_query_that_is_a_pipe_or_too_large_is_not_read(world):
    home, _, _, names = world
    os.mkfifo(home / "pipe.png")
    with (home / "large.png").open("wb") as file:
        file.truncate(lookup.MOST_BYTES + 1)
    found = find(world, home / "images" / names[0], home / "pipe.png", home / "large.png")
    assert [one.error for one in found] == [
        None,
        "is no regular file",
        "has more than 268,435,456 bytes, the most that are read",
    ]


def test_an_index_that_is_older_than_its_images_is_told(shades_registry, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    names = shades.write_images(tmp_path / "images", 5)
    (tmp_path / "images" / "bad.png").write_text("<html>")
    embed_again = functools.partial(shade_index.embed, shades_registry, tmp_path / "images", tmp_path / "index")
    embed_again()
    lookup.duplicates(tmp_path / "index", 0.9, 0.9, tmp_path)
    (tmp_path / "images" / names[0]).unlink()
    os.utime(tmp_path / "images" / names[1], (1, 1))
    os.utime(tmp_path / "images" / names[2], (1, 1))
    for new in ("a.png", "b.png", "c.png"):
        shutil.copy(tmp_path / "images" / names[1], tmp_path / "images" / new)
    with pytest.warns(match=r"is older than its images \(1 gone, 2 changed, 4 not in it\); `grainmill embed`"):
        lookup.duplicates(tmp_path / "index", 0.9, 0.9, tmp_path)
    embed_again()
    lookup.duplicates(tmp_path / "index", 0.9, 0.9, tmp_path)


@pytest.mark.parametrize("same", ["bytes", "embedding"])
def test_equal_images_are_groups_and_hide_no_copies(world, tmp_path, monkeypatch, same):
    home, uri, models, names = world
    do_without_ray(monkeypatch)
    monkeypatch.setattr(embed, "BLOCK", 30)
    shutil.copytree(home / "images", tmp_path / "images")
    placeholder = Image.new("RGB", (8, 8), "gray")
    for number in range(8):
        text = PngInfo()
        text.add_text("Comment", str(number) if same == "embedding" else "")
        placeholder.save(tmp_path / "images" / f"{number}-placeholder.png", pnginfo=text)
    shutil.copy(tmp_path / "images" / names[20], tmp_path / "images" / "zzz.png")
    embed.embed(uri, models[0], str(tmp_path / "images"), tmp_path / "index", 1, None, trainable.no_progress)
    found = lookup.duplicates(tmp_path / "index", 0.9, None, tmp_path)
    assert found.groups == [[f"{number}-placeholder.png" for number in range(8)], [names[20], "zzz.png"]]
    assert set(found.pairs) == {(names[number], names[74 + number]) for number in range(6)}
    with (tmp_path / "equal.csv").open() as file:
        assert [row["group"] for row in csv.DictReader(file)] == ["1"] * 8 + ["2"] * 2


def test_ten_thousand_equal_images_are_one_group(world, tmp_path, monkeypatch):
    made = index.Index(world[0] / "index")
    rows = np.repeat(next(iter(made.blocks()))[1][:1], 10_000, axis=0)
    monkeypatch.setattr(index.Index, "__len__", lambda _: 10_000)
    monkeypatch.setattr(index.Index, "column", lambda *_: map(str, range(10_000)))
    monkeypatch.setattr(index.Index, "blocks", lambda *_: iter([(0, rows)]))
    monkeypatch.setattr(lookup, "warn_if_older", lambda _: None)
    with pytest.warns(match=r"only equal images are listed: .* more than 50 different images, but .* has 1; give"):
        found = lookup.duplicates(made.folder, 0.9, None, tmp_path)
    assert (found.pairs, [len(group) for group in found.groups]) == ([], [10_000])


def test_groups_are_joined_by_bytes_and_by_embeddings():
    rows = np.eye(5, dtype="f4")[[0, 1, 0, 2, 1, 3, 3]]
    digests = ["a", "b", "c", "d", "c", "e", "f"]  # 0-2 by embedding, 2-4 by bytes, 1-4 by embedding, 5-6 too
    made = SimpleNamespace(
        column=lambda _: iter(digests),
        blocks=lambda start=0: [b for b in ((0, rows[:3]), (3, rows[3:])) if b[0] + len(b[1]) > start],
    )
    equal = EqualImages(made)
    assert [group.tolist() for group in equal.groups()] == [[0, 1, 2, 4], [5, 6]]
    assert equal.distinct.tolist() == [0, 3, 5]
    assert [(start, block.tolist()) for start, block in equal.blocks(1)] == [(1, rows[[3, 5]].tolist())]

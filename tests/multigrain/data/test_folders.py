"""What lies in an image folder, how it is split, and everything that can be wrong with it."""

import os
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from multigrain.config.data import DataSettings
from multigrain.data.dataset import CopySet, Dataset
from multigrain.data.folders import read_dataset
from multigrain.data.listing import LISTED, SPECIAL
from multigrain.errors import SHOWN, DataError, shortened
from multigrain.hooks import no_progress


def write_images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20, 120, 220)).save(root / name)


def names(paths, root):
    return [path.relative_to(root).as_posix() for path in paths]


def problems_of(folder, **settings):
    with pytest.raises(DataError) as caught:
        read_dataset(folder, **settings)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_folder_with_train_and_val_is_listed_class_by_class(tmp_path):
    write_images(tmp_path, "train/cat/b.png", "train/cat/a.JPG", "train/ant/deep/c.jpeg", "val/cat/z.webp")
    write_images(tmp_path, "train/.hidden/x.png", "val/.hidden/x.png")
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/folder.png").mkdir()
    data = read_dataset(tmp_path)
    assert data.classes == ("ant", "cat")
    assert names(data.train, tmp_path) == ["train/ant/deep/c.jpeg", "train/cat/a.JPG", "train/cat/b.png"]
    assert data.train_labels == (0, 1, 1)
    assert names(data.val, tmp_path) == ["val/cat/z.webp"]
    assert data.val_labels == (1,)
    assert data.copies is None


def test_copies_have_originals_first_then_distractors_and_the_truth_is_in_their_names(tmp_path):
    write_images(tmp_path / "copies", "original/200100.png", "original/200000.png", "distractors/0.png")
    write_images(tmp_path / "copies", "strong/200102.jpg", "strong/200001.jpg", "strong/200101.jpg", "crops/20/0.jpg")
    write_images(tmp_path, "train/a/0.png", "train/a/1.png", "val/a/2.png")
    copies = read_dataset(tmp_path).copies
    assert names(copies.database, tmp_path / "copies") == [
        "original/200000.png",
        "original/200100.png",
        "distractors/0.png",
    ]
    assert names(copies.queries, tmp_path / "copies") == [
        "strong/200001.jpg",
        "strong/200101.jpg",
        "strong/200102.jpg",
    ]
    assert copies.truth == (0, 1, 1)


def test_unsplit_folder_keeps_its_copies_apart_from_its_classes(tmp_path):
    write_images(tmp_path, "a/0.png", "a/1.png", "a/2.png", "copies/original/000000.png", "copies/strong/000001.png")
    data = read_dataset(tmp_path)
    assert data.classes == ("a",)
    assert len(data.copies.queries) == 1


def test_a_class_may_be_called_copies_below_train(tmp_path):
    write_images(tmp_path, "train/copies/0.png", "train/dog/1.png", "train/dog/2.png", "val/copies/3.png")
    assert read_dataset(tmp_path).classes == ("copies", "dog")


# The held-out names are those with the smallest `printf cat/0.png | sha256sum`, worked out with that command.
@pytest.mark.parametrize(
    ("share", "held_out"),
    [
        (0.01, {"8.png"}),
        (0.2, {"8.png", "0.png"}),
        (0.5, {"8.png", "0.png", "7.png", "5.png", "3.png"}),
    ],
)
def test_split_holds_out_a_share_of_each_class_by_hash(tmp_path, share, held_out):
    write_images(tmp_path, *(f"cat/{number}.png" for number in range(10)))
    data = read_dataset(tmp_path, share)
    assert {path.name for path in data.val} == held_out
    assert sorted(path.name for path in (*data.train, *data.val)) == [f"{number}.png" for number in range(10)]
    assert list(data.train) == sorted(data.train)


def test_split_of_a_class_depends_on_nothing_but_its_own_names(tmp_path):
    files = [f"cat/{number}.png" for number in range(10)]
    write_images(tmp_path / "one", *files)
    random.Random(0).shuffle(files)
    write_images(tmp_path / "other place", *files, *(f"{name}/{n}.png" for name in ("ape", "dog") for n in range(5)))
    alone, among = read_dataset(tmp_path / "one"), read_dataset(tmp_path / "other place")
    cats = [path for path, label in zip(among.val, among.val_labels, strict=True) if among.classes[label] == "cat"]
    assert [path.name for path in cats] == [path.name for path in alone.val]
    assert [path.name for path in among.val if path.parent.name == "dog"] == ["4.png"]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("images", [2, 3, 7])
def test_split_leaves_every_class_images_on_both_sides(tmp_path, images, share):
    write_images(tmp_path, *(f"{name}/{number}.png" for name in ("a", "b") for number in range(images)))
    data = read_dataset(tmp_path, share)
    assert set(data.train_labels) == set(data.val_labels) == {0, 1}
    assert not set(data.train) & set(data.val)
    assert len(data.train) + len(data.val) == 2 * images


GOOD = ("train/a/0.png", "train/a/1.png", "val/a/2.png")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            ("shop1/daisy/0.png", "shop1/rose/1.png", "shop2/daisy/2.png"),
            "{root}/shop1 holds only folders with images (daisy, rose)",
        ),
        (("shop1/daisy/0.png", "shop2/tulip/1.png"), "{root}/shop2 holds only folders with images (tulip)"),
        (("shop1/daisy/0.png", "shop1/rose/1.png", "tulip/2.png", "tulip/3.png"), "{root}/shop1 holds only folders"),
        (("train/x/a/0.png", "train/x/b/1.png", "val/x/2.png"), "{root}/train/x holds only folders with images (a, b)"),
        (("photos/a/0.png", "photos/b/1.png"), "but {root}/photos does, with a, b; name that folder"),
        (("photos/train/a/0.png", "photos/val/a/1.png", "x/2.png"), "but {root}/photos does, with train, val; name"),
        (("Train/a/0.png", "Val/a/1.png"), "{root} has 'Train' and 'Val', which would be classes"),
        (("Train/0.png", "Train/1.png", "val/2.png", "val/3.png"), "{root} has 'Train' and 'val', which would be"),
        (
            ("training/a/0.png", "validation/a/1.png", "test/a/2.png"),
            "has 'training' and 'test' and 'validation', which",
        ),
        (("training_set/a/0.png", "test_set/a/1.png"), "has 'training_set' and 'test_set', which would be classes"),
        (("train/a/0.png", "train/a/1.png", "valid/a/2.png"), "there is none in {root}; if valid is that, rename it"),
        (("a/0.png", "a/1.png", "a /0.png", "a /1.png"), "but {root} has 'a' and 'a '; make them one"),
        (("caf\u00e9/0.png", "cafe\u0301/1.png"), r"but {root} has 'cafe\u0301' and 'caf\xe9'; make them one"),
        (("train/a/0.png", "train/a/1.png", "val/A/2.png"), "there is no {root}/train/A, only 'a'"),
        (("train/a/0.png", "train/a/1.png", "val/a /2.png"), "there is no {root}/train/a , only 'a'"),
    ],
)
def test_a_layout_that_means_something_else_is_refused(tmp_path, files, problem):
    write_images(tmp_path, *files)
    assert any(problem.format(root=tmp_path) in text for text in problems_of(tmp_path))


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (("train/deep/a/0.png", "train/b/1.png", "val/b/2.png"), ("b", "deep")),
        (("a/0.png", "a/x/1.png", "a/y/2.png", "b/3.png", "b/4.png"), ("a", "b")),
        (("Train/0.png", "Train/1.png", "car/2.png", "car/3.png"), ("Train", "car")),
        (("a/0.png", "a/1.png", "A/2.png", "A/3.png"), ("A", "a")),
    ],
)
def test_a_layout_that_may_be_meant_is_read(tmp_path, files, classes):
    write_images(tmp_path, *files)
    assert read_dataset(tmp_path).classes == classes


def test_what_lies_beside_the_images_is_left_out_and_named(tmp_path):
    write_images(tmp_path, *GOOD, "0.png", "train/1.png", "test/a/2.png", "copies/original/200000.png")
    write_images(tmp_path, "copies/strong/200001.png", "copies/strong/.x.png", "train/a/.thumbs/x.png", ".git/x.png")
    (tmp_path / "copies/original/200100.jp2").touch()
    os.mkfifo(tmp_path / "train/a/pipe.png")
    (tmp_path / "val/a/train.png").symlink_to(tmp_path / "train/a/0.png")
    data = read_dataset(tmp_path)
    assert (names(data.train, tmp_path), names(data.val, tmp_path)) == ([*GOOD[:2]], [GOOD[2]])
    assert data.left_out == {
        "0.png": "lies outside the folders of classes",
        "train/1.png": "lies outside the folders of classes",
        "test/": "is none of the folders train, val and copies",
        "train/a/pipe.png": SPECIAL,
        "val/a/train.png": LISTED,
        "copies/original/200100.jp2": "is a .jp2 file, which is not read; save it as JPEG or PNG",
    }
    assert data.litter == 3


def test_a_class_that_is_a_link_to_another_has_no_images_of_its_own(tmp_path):
    write_images(tmp_path, "b/0.png", "b/1.png")
    (tmp_path / "a").symlink_to("b", target_is_directory=True)
    problems = problems_of(tmp_path)
    assert any(f"found none in {tmp_path}/b, only b, which {LISTED}" in text for text in problems)


@pytest.mark.parametrize(
    ("files", "folders", "problem"),
    [
        (GOOD, ["train/b"], "must hold images"),
        (GOOD, ["val/a", "val/b", "train/b"], "val/b"),
        ((*GOOD, "val/c/0.png"), [], "there is no {root}/train/c"),
        (GOOD[:2], [], "needs val/<class>/"),
        (GOOD[:2], ["val"], "needs val/<class>/"),
        (("train/a/0.png", "val/a/2.png"), [], "at least 2 images, found 1"),
        (("a/0.png", "a/1.png", "b/0.png"), [], "found 1 in {root}/b"),
        (("a/0.png", "a/1.png"), ["b"], "found none in {root}/b"),
        (("0.png",), [], "has no folders"),
        (GOOD, ["copies"], "found none"),
        ((*GOOD, "copies/original/200000.png"), [], "needs images in {root}/copies/strong"),
        ((*GOOD, "copies/strong/200001.png"), [], "needs images in {root}/copies/original"),
        (
            (*GOOD, "copies/original/200000.png", "copies/strong/200001.png", "copies/strong/200101.png"),
            [],
            "{root}/copies/strong/200101.png",
        ),
    ],
)
def test_a_wrong_layout_is_told(tmp_path, files, folders, problem):
    write_images(tmp_path, *files)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    assert any(problem.format(root=tmp_path) in text for text in problems_of(tmp_path))


def test_a_missing_folder_is_told_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (problem,) = problems_of(tmp_path.relative_to(tmp_path) / "nowhere")
    assert str(tmp_path / "nowhere") in problem


def test_all_problems_of_a_layout_are_told_at_once(tmp_path):
    write_images(tmp_path, "train/a/0.png", "val/a/1.png", "val/c/2.png")
    write_images(tmp_path, "copies/original/200000.png", "copies/strong/300001.png", "copies/strong/400001.png")
    (tmp_path / "train/b").mkdir()
    (tmp_path / "val/d").mkdir()
    problems = problems_of(tmp_path)
    expected = ["train/c", "train/d", "train/b", "val/d", "found 1", "300001.png", "400001.png"]
    for part in expected:
        assert sum(part in problem for problem in problems) == 1, part
    assert len(problems) == len(expected)


def test_all_problems_of_an_unsplit_folder_are_told_at_once(tmp_path):
    write_images(tmp_path, "a/0.png", "b/0.png", "b/1.png", "b/2.png", "d/0.png")
    for folder in ("c", "copies"):
        (tmp_path / folder).mkdir()
    problems = problems_of(tmp_path)
    expected = [f"found 1 in {tmp_path}/a", f"found 1 in {tmp_path}/d", f"found none in {tmp_path}/c"]
    expected += [f"{tmp_path}/copies/original", f"{tmp_path}/copies/strong"]
    for part in expected:
        assert sum(part in problem for problem in problems) == 1, part
    assert len(problems) == len(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"builtin": "digits", "folder": "somewhere"},
        {"builtin": "digits", "manifest": "list.csv"},
        {"folder": "somewhere", "manifest": "list.csv"},
        {"builtin": "digits", "folder": "somewhere", "manifest": "list.csv"},
        {"folder": "somewhere", "skip_broken": 1},
        {"builtin": "letters"},
        {"folder": "somewhere", "val_share": 0.0},
        {"folder": "somewhere", "val_share": 1.0},
        {"folder": "somewhere", "shuffle": True},
        {"builtin": "shapes", "images": 19},
        {"builtin": "shapes", "image_size": 8},
    ],
)
def test_data_settings_refuse_what_has_no_meaning(settings):
    with pytest.raises(ValidationError):
        DataSettings(**settings)


@pytest.mark.parametrize("source", [{"builtin": "digits"}, {"folder": "somewhere"}, {"manifest": "list.csv"}])
def test_data_settings_take_one_source(source):
    assert DataSettings(**source).skip_broken is False


A, B, C, D = (Path(name) for name in "abcd")


def test_an_image_is_its_own_instance_unless_told_otherwise():
    assert Dataset(("x",), (A, B, C), (0, 0, 0), (D,), (0,), None).instances == (0, 1, 2)
    assert Dataset(("x",), (A, B, C), (0, 0, 0), (D,), (0,), None, (0, 0, 2)).instances == (0, 0, 2)


def test_the_paths_of_a_data_set_are_each_file_once():
    assert Dataset(("x",), (A, B), (0, 0), (C,), (0,), None).paths == (A, B, C)
    assert Dataset(("x",), (A, B), (0, 0), (C,), (0,), CopySet((C, A), (D,), (0,))).paths == (A, B, C, D)


@pytest.mark.parametrize(
    ("labels", "copies", "metrics"),
    [
        ((0, 1), None, ("top1",)),
        ((0, 1, 0), None, ("top1", "class_map")),
        ((0, 1), CopySet((C,), (D,), (0,)), ("top1", "copy_map", "mean_top1_copy_map")),
        ((1, 1), CopySet((C,), (D,), (0,)), ("top1", "class_map", "copy_map", "mean_top1_copy_map")),
    ],
)
def test_the_metrics_are_those_that_the_images_have_truth_for(labels, copies, metrics):
    assert Dataset(("x", "y"), (A, B), (0, 1), (C, D, A)[: len(labels)], labels, copies).metrics == metrics


def test_long_lists_are_cut_and_the_rest_is_counted():
    lines = [f"line {number}" for number in range(SHOWN + 3)]
    assert shortened(lines[:SHOWN]) == lines[:SHOWN]
    assert shortened(lines[: SHOWN + 1]) == [*lines[:SHOWN], "and 1 more of the kind"]
    assert shortened(lines) == [*lines[:SHOWN], "and 3 more of the kind"]
    error = DataError(lines)
    assert error.problems == lines
    assert str(error).splitlines() == shortened(lines)


def test_untracked_leaves_a_loop_as_it_is():
    assert list(no_progress([1, 2], "title", 2)) == [1, 2]


def test_names_that_are_not_utf8_are_split_too(tmp_path):
    write_images(tmp_path, *(f"{os.fsdecode(bytes([0xE9]))}/{number}.png" for number in range(4)))
    data = read_dataset(tmp_path)
    assert (len(data.train), len(data.val)) == (3, 1)


def test_a_name_that_no_folder_can_have_is_a_missing_folder(tmp_path):
    (problem,) = problems_of(tmp_path / ("long" * 100))
    assert "must exist" in problem


def test_moving_a_folder_does_not_change_its_split(tmp_path):
    write_images(tmp_path / "here", *(f"{name}/{number}.png" for name in "ab" for number in range(6)))
    before = names(read_dataset(tmp_path / "here").val, tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert names(read_dataset(tmp_path / "there").val, tmp_path / "there") == before

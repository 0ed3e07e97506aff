"""Leaving out broken images: what is left, what is told, and when too little is left."""

import csv
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multigrain.data.dataset import CopySet, Dataset
from multigrain.data.manifest import manifest_text, read_manifest
from multigrain.data.validation import leave_out, write_intact
from multigrain.errors import DataError

TRAIN = tuple(Path(f"/images/train/{number}.png") for number in range(20))
VAL = tuple(Path(f"/images/val/{number}.png") for number in range(8))
DATABASE = tuple(Path(f"/images/database/{number}.png") for number in range(4))
QUERIES = tuple(Path(f"/images/query/{number}.png") for number in range(4))
LABELS = tuple(number % 2 for number in range(20))
WHOLE = Dataset(
    ("cat", "dog"),
    TRAIN,
    LABELS,
    VAL,
    (0, 0, 0, 0, 1, 1, 1, 1),
    CopySet(DATABASE, QUERIES, (2, 0, 2, 1)),
    (0, 0, 0, *range(3, 20)),
)


def problems_of(dataset, broken):
    with pytest.raises(DataError) as caught:
        leave_out(dataset, dict.fromkeys(broken, "is empty"))
    return caught.value.problems


def test_a_set_without_faults_stays_as_it_is():
    assert leave_out(WHOLE, {}) == (WHOLE, {})


def test_broken_images_of_classes_are_left_out_with_their_labels():
    intact, left_out = leave_out(WHOLE, {TRAIN[1]: "is empty", VAL[4]: "is not an image"})
    assert left_out == {TRAIN[1]: "is empty", VAL[4]: "is not an image"}
    assert intact.train == (TRAIN[0], *TRAIN[2:])
    assert intact.train_labels == (LABELS[0], *LABELS[2:])
    assert (intact.val, intact.val_labels) == ((*VAL[:4], *VAL[5:]), (0, 0, 0, 0, 1, 1, 1))
    assert (intact.classes, intact.copies) == (WHOLE.classes, WHOLE.copies)
    assert intact.instances == (0, 0, *range(2, 19))


def test_the_first_of_an_instance_may_be_left_out():
    intact, _ = leave_out(WHOLE, {TRAIN[0]: "is empty"})
    assert intact.instances == (0, 0, *range(2, 19))


def test_a_broken_distractor_or_query_is_left_out_of_the_copies():
    intact, left_out = leave_out(WHOLE, {DATABASE[3]: "is empty", QUERIES[0]: "is empty"})
    assert intact.copies == CopySet(DATABASE[:3], QUERIES[1:], (0, 2, 1))
    assert set(left_out) == {DATABASE[3], QUERIES[0]}


def test_the_queries_of_a_broken_original_are_left_out_with_it():
    faults = {DATABASE[2]: "is empty"}
    intact, left_out = leave_out(WHOLE, faults)
    assert faults == {DATABASE[2]: "is empty"}
    assert intact.copies == CopySet((*DATABASE[:2], DATABASE[3]), (QUERIES[1], QUERIES[3]), (0, 1))
    assert set(left_out) == {DATABASE[2], QUERIES[0], QUERIES[2]}
    assert str(DATABASE[2]) in left_out[QUERIES[0]]


@given(st.sets(st.sampled_from([*TRAIN, *VAL, DATABASE[1], DATABASE[3], *QUERIES]), max_size=2))
def test_what_is_left_says_of_each_image_what_the_whole_said(broken):
    intact, left_out = leave_out(WHOLE, dict.fromkeys(broken, "is empty"))
    assert set(WHOLE.paths) - set(intact.paths) == set(left_out)

    def told(dataset):
        group = {dataset.train[index]: [] for index in dataset.instances}
        for path, index in zip(dataset.train, dataset.instances, strict=True):
            group[dataset.train[index]].append(path)
        return (
            [(path, label) for path, label in zip(dataset.train, dataset.train_labels, strict=True)],
            [(path, label) for path, label in zip(dataset.val, dataset.val_labels, strict=True)],
            sorted(group.values()),
            {
                (query, dataset.copies.database[index])
                for query, index in zip(dataset.copies.queries, dataset.copies.truth, strict=True)
            },
        )

    train, val, groups, pairs = told(WHOLE)
    kept = [[path for path in group if path not in left_out] for group in groups]
    assert told(intact) == (
        [pair for pair in train if pair[0] not in left_out],
        [pair for pair in val if pair[0] not in left_out],
        sorted(group for group in kept if group),
        {pair for pair in pairs if not set(pair) & set(left_out)},
    )


def test_a_tenth_may_be_left_out_and_no_more():
    # 36 images: 3 are less than a tenth, 4 more.
    leave_out(WHOLE, dict.fromkeys(TRAIN[:3], "is empty"))
    (problem,) = problems_of(WHOLE, TRAIN[:4])
    assert "at most a tenth" in problem
    assert f"4 of 36 cannot be used, the first of them because {TRAIN[0]} is empty" in problem
    exactly = Dataset(("cat", "dog"), TRAIN[:12], LABELS[:12], VAL, WHOLE.val_labels, None)  # 20 images
    leave_out(exactly, dict.fromkeys(TRAIN[:2], "is empty"))
    assert len(problems_of(exactly, TRAIN[:3])) == 1


def test_a_class_left_without_images_is_told_by_its_part():
    labels = (0, *(1,) * 19)
    dataset = Dataset(("cat", "dog"), TRAIN, labels, VAL, (0, 0, 0, 0, 0, 0, 0, 1), None)
    leave_out(dataset, {TRAIN[1]: "is empty"})
    problems = problems_of(dataset, (TRAIN[0], VAL[7]))
    assert [("all 1 of 'cat' in train" in problem, "all 1 of 'dog' in val" in problem) for problem in problems] == [
        (True, False),
        (False, True),
    ]


def test_a_metric_that_is_lost_is_told():
    one_query = Dataset(("cat", "dog"), TRAIN, LABELS, VAL[:3], (0, 0, 1), CopySet(DATABASE[:1], QUERIES[:1], (0,)))
    (problem,) = problems_of(one_query, QUERIES[:1])
    assert "no copy_map and no mean_top1_copy_map" in problem
    (problem,) = problems_of(one_query, DATABASE[:1])
    assert "no copy_map" in problem
    (problem,) = problems_of(one_query, VAL[:1])
    assert "no class_map" in problem


def test_a_name_that_is_not_utf8_is_left_out():
    strange = Path(os.fsdecode(b"/images/train/\xe9.png"))
    dataset = Dataset(("cat", "dog"), (*TRAIN, strange), (*LABELS, 0), VAL, WHOLE.val_labels, None)
    intact, left_out = leave_out(dataset, {})
    assert left_out == {strange: "has a name that is not UTF-8"}
    assert intact.train == TRAIN


@pytest.fixture
def on_disk(tmp_path):
    """As `WHOLE`, in files that exist."""

    def move(paths):
        moved = tuple(tmp_path / path.relative_to("/") for path in paths)
        for path in moved:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return moved

    copies = CopySet(move(DATABASE), move(QUERIES), WHOLE.copies.truth)
    return Dataset(WHOLE.classes, move(TRAIN), LABELS, move(VAL), WHOLE.val_labels, copies, WHOLE.instances)


def test_what_is_written_is_the_intact_set_and_the_list_of_the_others(tmp_path, on_disk):
    intact, _ = leave_out(on_disk, {on_disk.train[1]: "is empty"})
    manifest = write_intact(manifest_text(intact), "\udce9.png\tis strange\n", tmp_path / "data")
    assert manifest.parent.parent == tmp_path / "data"
    again = read_manifest(manifest)
    assert (again.train, again.train_labels, again.instances) == (intact.train, intact.train_labels, intact.instances)
    assert (again.val, again.val_labels, again.copies.queries) == (intact.val, intact.val_labels, intact.copies.queries)
    assert (manifest.parent / "skipped.txt").read_text() == "\\udce9.png\tis strange\n"
    with manifest.open(newline="") as file:
        assert all(Path(row["image"]).is_absolute() for row in csv.DictReader(file))
    assert sorted(path.name for path in manifest.parent.iterdir()) == ["manifest.csv", "skipped.txt"]


def test_the_same_set_is_written_to_the_same_place_and_another_elsewhere(tmp_path, on_disk):
    first = write_intact(manifest_text(on_disk), "", tmp_path)
    content = first.read_bytes()
    first.unlink()  # as if the writer had been killed
    assert write_intact(manifest_text(on_disk), "", tmp_path) == first
    assert first.read_bytes() == content
    fewer, _ = leave_out(on_disk, {on_disk.train[0]: "is empty"})
    assert write_intact(manifest_text(fewer), "", tmp_path) != first
    assert write_intact(manifest_text(on_disk), "0.png\tis empty\n", tmp_path) != first

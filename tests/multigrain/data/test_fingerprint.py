"""Digests tell data sets apart, wherever they are."""

import shutil
from dataclasses import replace

import pytest

from multigrain.data.dataset import CopySet, Dataset
from multigrain.data.fingerprint import parts


@pytest.fixture
def dataset(tmp_path):
    """Four images and a copy-detection set, as files of one byte."""

    def make(root):
        names = ["ant/a", "ant/b", "bee/c", "ant/d", "o", "x", "q"]
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"1")
        a, b, c, d, o, x, q = (root / name for name in names)
        return Dataset(("ant", "bee"), (a, b, c), (0, 0, 1), (d,), (0,), CopySet((o, x), (q,), (0,)))

    return make(tmp_path / "here")


def digests(dataset):
    return {part.name: part.digest for part in parts(dataset)}


def test_parts_have_their_names_roles_and_rows(dataset, tmp_path):
    found = [part._replace(digest="") for part in parts(dataset)]
    where = str(tmp_path / "here")
    assert found == [
        ("train", "training", "", 3, where),
        ("val", "evaluation", "", 1, where),
        ("copies", "evaluation", "", 3, where),
    ]
    assert [part.name for part in parts(replace(dataset, copies=None))] == ["train", "val"]
    assert all(len(part.digest) == 32 for part in parts(dataset))


def test_the_same_images_elsewhere_have_the_same_digests(dataset, tmp_path):
    shutil.copytree(tmp_path / "here", tmp_path / "there")

    def moved(paths):
        return tuple(tmp_path / "there" / path.relative_to(tmp_path / "here") for path in paths)

    copies = dataset.copies
    there = replace(
        dataset,
        train=moved(dataset.train),
        val=moved(dataset.val),
        copies=replace(copies, database=moved(copies.database), queries=moved(copies.queries)),
    )
    assert digests(there) == digests(dataset)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda d: d.train[1].write_bytes(b"12"), "train"),
        (lambda d: d.val[0].write_bytes(b"12"), "val"),
        (lambda d: d.copies.queries[0].write_bytes(b"12"), "copies"),
        (lambda d: replace(d, train_labels=(0, 1, 1)), "train"),
        (lambda d: replace(d, instances=(0, 0, 2)), "train"),
        (lambda d: replace(d, train=d.train[:2], train_labels=(0, 0), instances=(0, 1)), "train"),
        (lambda d: replace(d, classes=("ant", "wasp"), val_labels=(1,)), "val"),
        (lambda d: replace(d, copies=replace(d.copies, truth=(1,))), "copies"),
    ],
)
def test_each_change_is_seen_in_its_part(dataset, change, part):
    before, changed = digests(dataset), change(dataset)
    after = digests(changed if isinstance(changed, Dataset) else dataset)
    assert after[part] != before[part]
    if part != "train":
        assert after["train"] == before["train"] or changed.classes != dataset.classes

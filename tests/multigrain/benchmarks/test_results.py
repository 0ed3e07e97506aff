"""Digests of evaluation data: the same data wherever they lie, and nothing else, have the same."""

from dataclasses import replace

import numpy as np
import pytest

from multigrain.benchmarks.results import digests
from multigrain.data.picture import Picture
from multigrain.evaluation.benchmark import Benchmark
from multigrain.retrieval.metrics import Truth


def made(folder, contents=("a", "b", "c", "d")):
    folder.mkdir()
    paths = [folder / f"{number}.jpg" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    easy = (Truth(np.array([0]), np.array([], np.int64)), Truth(np.array([1]), np.array([0])))
    hard = (Truth(np.array([1]), np.array([], np.int64)), Truth(np.array([0]), np.array([], np.int64)))
    shown = [Picture(path) for path in paths]
    return Benchmark("set", tuple(shown[:2]), tuple(shown[2:]), {"easy": easy, "hard": hard}, ("map",))


def test_the_same_images_elsewhere_have_the_same_digest_and_each_part_its_own(tmp_path):
    first, second = digests(made(tmp_path / "here")), digests(made(tmp_path / "there"))
    assert first == second
    assert first.keys() == {"easy", "hard"}
    assert first["easy"] != first["hard"]


def swapped(one):
    return replace(one, queries=one.queries[::-1])


def moved(one):
    return replace(one, database=one.database[:1], queries=(one.database[1], *one.queries[1:]))


def cropped(one):
    return replace(one, queries=(one.queries[0]._replace(box=(0, 0, 1, 1)), one.queries[1]))


def turned(one):
    return replace(one, queries=(one.queries[0]._replace(turn=90), one.queries[1]))


def other_truth(one):
    first, second = one.truth["easy"]
    return replace(one, truth={"easy": (first, Truth(second.positives, first.junk))})


def rewritten(one):
    one.queries[0].path.write_text("e")
    return one


@pytest.mark.parametrize("change", [swapped, moved, cropped, turned, other_truth, rewritten])
def test_what_changes_the_values_changes_the_digest(tmp_path, change):
    one = made(tmp_path / "here")
    before = digests(one)["easy"]
    assert digests(change(one))["easy"] != before


def test_labels_and_their_classes_count(tmp_path):
    one = replace(made(tmp_path / "here"), truth={}, labels=(0, 1), classes=("x", "y"))
    others = [replace(one, labels=(1, 0)), replace(one, classes=("y", "x")), one]
    first, second, same = (digests(other)[""] for other in others)
    assert same == digests(one)[""]
    assert len({first, second, same}) == 3

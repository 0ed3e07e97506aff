"""Counts of a data set and warnings about it, for images whose counts are known."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multigrain.data import findings
from multigrain.data.dataset import CopySet, Dataset
from multigrain.data.findings import ALIKE, alike, find
from multigrain.data.folders import read_dataset
from multigrain.data.validation import ImageFacts, examine, outline


def facts(content, bits=b"\1" * 16, size=(8, 8), turned=False, kind="PNG"):
    return ImageFacts(kind, *size, turned, content.encode(), bits)


def dataset(train, val, copies=None, **others):
    """A data set from names such as `a/1`, whose folder is the class."""
    classes = tuple(sorted({name.partition("/")[0] for name in train}))

    def part(names):
        return tuple(Path("/set", name) for name in names), tuple(classes.index(name.split("/")[0]) for name in names)

    return Dataset(classes, *part(train), *part(val), copies, **others)


def examined(data, **changes):
    """Facts that differ from image to image, but for the changes, which are by name."""
    names = [str(path.relative_to("/set")) for path in data.paths]
    bits = [np.random.default_rng(number).bytes(16) for number in range(len(names))]
    return {
        Path("/set", name): changes.get(name.replace("/", "_"), facts(name, one))
        for name, one in zip(names, bits, strict=True)
    }


def test_images_are_counted():
    copies = CopySet((Path("/set/o/1"), Path("/set/o/2")), (Path("/set/q/1"),), (0,))
    data = dataset(
        ["a/1", "a/2", "b/1"], ["a/3", "b/2"], copies, left_out={"x.txt": "is not an image, by its suffix"}, litter=2
    )
    found = find(
        data, examined(data, a_1=facts("1", size=(400, 300), kind="JPEG"), b_1=facts("2", b"\2" * 16, (64, 32), True))
    )
    assert found.figures == {
        "classes": "2, of 1 (b) to 2 (a) training images",
        "images": "3 to train on, 2 held out",
        "copies": "1 of 2 images",
        "formats": "PNG 7, JPEG 1",
        "pixels": "8 x 8 to 400 x 300, median 8 x 8; 1 turned as their EXIF data say",
        "left out": "1: x.txt; 2 hidden or left behind by systems",
    }
    assert found.facts == {
        "classes": {"a": 2, "b": 1},
        "train": 3,
        "val": 2,
        "copies": {"database": 2, "queries": 1},
        "formats": {"PNG": 7, "JPEG": 1},
        "pixels": [(8, 8), (8, 8), (400, 300)],
        "turned": 1,
        "repeats": [],
        "left_out": {"is not an image, by its suffix": ["x.txt"]},
        "hidden": 2,
    }


@pytest.mark.parametrize(
    ("train", "val", "warning"),
    [
        (["a/1", "a/2"], ["a/3"], "there is one class only, 'a', so top1 is 1 for any network; "),
        (["a/1", "a/2", "b/1"], ["a/3"], "1 class has one training image only: b"),
        (["a/1", "b/1"], ["a/3"], "2 classes have one training image only: a, b"),
        (["a/1", "a/2", "A/1", "A/2"], ["a/3"], "the classes 'A' and 'a' differ only by case; "),
        (
            [*(f"a/{number}" for number in range(100)), "b/1"],
            ["a/x"],
            "classes are of very different sizes, from 1 (b) to 100 (a) training images; ",
        ),
    ],
)
def test_odd_classes_are_warned_of(train, val, warning):
    data = dataset(train, val)
    assert any(text.startswith(warning) for text in find(data, examined(data)).warnings)


def test_common_sets_give_no_warning():
    data = dataset([f"{label}/{number}" for label in "ab" for number in range(2)], ["a/x", "b/x"])
    assert find(data, examined(data)).warnings == []
    data = dataset([*(f"a/{number}" for number in range(198)), "b/1", "b/2"], ["a/x"])
    assert find(data, examined(data)).warnings == [], "99 times as many are not 100"


def test_the_same_content_in_both_halves_and_in_two_classes_is_warned_of():
    data = dataset(["a/1", "a/2", "b/1", "b/2"], ["a/3", "b/3"])
    one, two = facts("one"), facts("two", b"\2" * 16)
    found = find(data, examined(data, a_1=one, a_3=one, a_2=two, b_2=two))
    assert found.warnings == [
        "1 held-out image has the content of a training image: a/3 and a/1",
        "1 image is in two classes with the same content: a/2 and b/2",
    ]
    assert found.figures["repeats"] == "2 images have the content of another"
    assert found.facts["repeats"] == [["a/1", "a/3"], ["a/2", "b/2"]]


def test_originals_of_copies_that_are_trained_on_are_warned_of():
    copies = CopySet((Path("/set/o/1"),), (Path("/set/q/1"),), (0,))
    data = dataset(["a/1", "a/2", "b/1", "b/2"], ["a/3"], copies)
    same = facts("same")
    (warning,) = find(data, examined(data, b_2=same, o_1=same)).warnings
    assert warning == "1 held-out image has the content of a training image: o/1 and b/2"


def test_images_that_look_alike_are_found_as_by_a_loop_over_all_pairs():
    rng = np.random.default_rng(7)
    train = {Path(f"t{number}"): rng.bytes(16) for number in range(40)}
    held_out = {}
    for number in range(12):  # number bits away from a training image
        bits = np.unpackbits(np.frombuffer(train[Path(f"t{number}")], np.uint8))
        bits[rng.choice(128, number, replace=False)] ^= 1
        held_out[Path(f"v{number}")] = np.packbits(bits).tobytes()
    expected = []
    for path, bits in held_out.items():
        distances = {
            other: (int.from_bytes(bits) ^ int.from_bytes(known)).bit_count() for other, known in train.items()
        }
        nearest = min(distances, key=distances.__getitem__)
        expected += [(path, nearest)] if distances[nearest] <= ALIKE else []
    assert alike(held_out, train) == expected
    assert len(expected) == ALIKE + 1
    assert alike(held_out, {}) == alike({}, train) == []


def test_an_outline_says_where_brightness_rises():
    step = np.zeros((90, 90, 3), np.uint8)
    step[:, 40:] = 255  # rises from the fourth to the fifth of nine cells, in each row
    bits = np.unpackbits(np.frombuffer(outline(step), np.uint8)).reshape(2, 8, 8)
    assert bits[0].sum(axis=0).tolist() == [0, 0, 0, 8, 0, 0, 0, 0]
    assert bits[1].sum() == 0
    assert np.array_equal(
        np.unpackbits(np.frombuffer(outline(step.transpose(1, 0, 2)), np.uint8)).reshape(2, 8, 8)[1].T, bits[0]
    )


def test_a_copy_in_another_size_and_format_looks_like_its_original(tmp_path):
    rng = np.random.default_rng(0)
    for place in ("train/a/1.png", "train/a/2.png", "train/b/1.png", "train/b/2.png", "val/a/3.jpg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((240, 180), Image.Resampling.BICUBIC).save(tmp_path / place)
    with Image.open(tmp_path / "train/b/2.png") as original:
        original.resize((160, 120)).save(tmp_path / "val/a/3.jpg", quality=60)
    data = read_dataset(tmp_path)
    found = find(data, examine(data))
    assert found.warnings == ["1 held-out image looks like a training image: val/a/3.jpg and train/b/2.png"]


def test_broken_images_count_as_left_out():
    data = dataset(["a/1", "a/2", "b/1", "b/2"], ["a/3", "b/3"])
    found = find(data, examined(data, a_2="is empty", b_3="is empty"))
    assert found.warnings == ["2 files are left out, because each is empty: a/2, b/3"]
    assert found.figures["left out"] == "2: a/2, b/3"


def test_equal_images_are_told():
    data = dataset(["a/1", "b/1"], ["a/3"])
    same = facts("same")
    assert findings.all_equal(examined(data, a_1=same, b_1=same, a_3=same))
    assert not findings.all_equal(examined(data, a_1=same, b_1=same))
    assert not findings.all_equal({Path("a"): same, Path("b"): "is empty"}), "one image equals itself"

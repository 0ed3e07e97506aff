"""The built-in images: what is drawn, and what is written, where and how often."""

import csv
import fcntl
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from multigrain.config.data import DataSettings
from multigrain.data import builtin
from multigrain.data.copies import read_copies
from multigrain.data.folders import read_dataset
from multigrain.hooks import no_progress


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    return builtin.write_builtin(DataSettings(builtin="digits"), root, no_progress)


def files(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def contents(folder):
    return {name: path.read_bytes() for name, path in files(folder).items()}


def standardised(values):
    rows = np.asarray(values, dtype=float).reshape(len(values), -1)
    return (rows - rows.mean(axis=1, keepdims=True)) / rows.std(axis=1, keepdims=True)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((32, 32)))


def size(path):
    with Image.open(path) as image:
        return image.size


def recorded_split(folder):
    with (folder / "split.csv").open() as file:
        return {row["file"]: (row["class"], row["split"]) for row in csv.DictReader(file)}


def test_there_are_1797_digits_in_the_classes_of_the_original(digits_folder):
    data = read_dataset(digits_folder)
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.val) == 1797
    found = Counter((*data.train_labels, *data.val_labels))
    assert found == Counter(load_digits().target.tolist())


def test_each_digit_file_shows_its_scan(digits_folder):
    scans = load_digits()
    paths = (*read_dataset(digits_folder).train[::60], *read_dataset(digits_folder).val[::20])
    # Every scanned pixel has become 4 x 4 pixels; their mean is nearer to it than to any other scan.
    shrunk = [pixels(path).reshape(8, 4, 8, 4).mean(axis=(1, 3)) for path in paths]
    nearest = (standardised(shrunk) @ standardised(scans.images).T).argmax(axis=1)
    for path, index in zip(paths, nearest, strict=True):
        assert size(path) == (32, 32)
        assert path.stem == f"digit{index:04d}"
        assert path.parent.name == str(scans.target[index])


# Held out are names whose `printf digit0000 | sha256sum` begins below 4, a quarter of all hexadecimal digits.
def test_digits_are_held_out_by_the_hash_of_their_name(digits_folder):
    split = {Path(name).stem: side for name, (_, side) in recorded_split(digits_folder).items()}
    assert [split[f"digit000{number}"] for number in range(10)] == ["val", *["train"] * 7, "val", "train"]
    # 1797 draws of a quarter: 449 with a standard deviation of 18.
    assert abs(Counter(split.values())["val"] - 449) < 4 * 18


@pytest.mark.parametrize("source", ["digits_folder", "shapes_folder"])
def test_recorded_split_is_what_lies_on_disk(source, request):
    folder = request.getfixturevalue(source)
    on_disk = {name for name in files(folder) if name.startswith(("train/", "val/"))}
    record = recorded_split(folder)
    assert set(record) == on_disk
    assert all(name.split("/")[:2] == [side, kind] for name, (kind, side) in record.items())


def test_the_same_settings_write_the_same_bytes_anywhere(shapes_folder, tmp_path):
    settings = DataSettings(builtin="shapes", images=40, image_size=32)
    assert contents(builtin.write_builtin(settings, tmp_path / "again", no_progress)) == contents(shapes_folder)


def test_pictures_keep_their_side_of_the_split_when_there_are_more_of_them(shapes_folder, tmp_path):
    settings = DataSettings(builtin="shapes", images=60, image_size=32)
    more = recorded_split(builtin.write_builtin(settings, tmp_path, no_progress))
    assert recorded_split(shapes_folder).items() <= more.items()


@pytest.mark.parametrize(("source", "originals"), [("digits_folder", 157), ("shapes_folder", 7)])
def test_copies_have_the_layout_of_copydays(source, originals, request):
    root = request.getfixturevalue(source) / "copies"
    blocks = [str(2000 + number) for number in range(originals)]
    expected = {f"original/{block}00.png" for block in blocks}
    expected |= {f"strong/{block}{number}.jpg" for block in blocks for number in ("01", "02")}
    expected |= {f"crops/{percent}/{block}00.jpg" for block in blocks for percent in (20, 50, 80)}
    expected |= {f"jpegqual/{quality}/{block}00.jpg" for block in blocks for quality in (75, 30, 10, 5)}
    assert {name for name in files(root) if not name.startswith("distractors/")} == expected
    copies, _ = read_copies(root)
    assert len(copies.queries) == 2 * originals
    for query, truth in zip(copies.queries, copies.truth, strict=True):
        assert copies.database[truth].parent.name == "original"
        assert copies.database[truth].stem[:4] == query.stem[:4]


@pytest.mark.parametrize("source", ["digits_folder", "shapes_folder"])
def test_originals_and_distractors_are_the_held_out_images_each_once(source, request):
    folder = request.getfixturevalue(source)
    data = read_dataset(folder)
    assert sorted(path.read_bytes() for path in data.copies.database) == sorted(path.read_bytes() for path in data.val)


def test_copies_show_their_original_and_are_distorted(digits_folder):
    copies, _ = read_copies(digits_folder / "copies")
    originals = standardised([pixels(path) for path in copies.database[:157]])
    likeness = standardised([pixels(path) for path in copies.queries]) @ originals.T / 32**2
    truth = np.array(copies.truth)
    # By pixels, one in three is nearest to its original; by chance it would be one in 157.
    assert (likeness.argmax(axis=1) == truth).mean() > 0.2
    assert likeness[np.arange(314), truth].max() < 0.99
    assert len({path.read_bytes() for path in copies.queries}) == 314


# Sides of 32 pixels without 20, 50 and 80 % of the area: 32 sqrt(0.8) = 28.6, 32 sqrt(0.5) = 22.6, 32 sqrt(0.2) = 14.3.
@pytest.mark.parametrize(("percent", "side"), [(20, 29), (50, 23), (80, 14)])
def test_crops_cut_their_share_of_the_area_away(digits_folder, percent, side):
    found = {size(path) for path in (digits_folder / "copies/crops" / str(percent)).iterdir()}
    assert found == {(side, side)}


def test_jpeg_copies_get_coarser_as_the_quality_falls(digits_folder):
    def coarseness(quality):
        with Image.open(digits_folder / f"copies/jpegqual/{quality}/200000.jpg") as image:
            return sum(image.quantization[0])

    steps = [coarseness(quality) for quality in (75, 30, 10, 5)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(("step", "fails_at"), [("_save", 1), ("_save", 30), ("_save", 60), ("write_copies", 1)])
def test_an_interrupted_write_leaves_nothing_under_the_final_name(tmp_path, monkeypatch, step, fails_at):
    settings = DataSettings(builtin="shapes", images=40, image_size=32)
    works, calls = getattr(builtin, step), iter(range(1, 1000))

    def failing(*args):
        if next(calls) == fails_at:
            raise OSError("the disk is full")
        return works(*args)

    monkeypatch.setattr(builtin, step, failing)
    with pytest.raises(OSError, match="disk"):
        builtin.write_builtin(settings, tmp_path, no_progress)
    assert not (tmp_path / "shapes-40x32").exists()
    (tmp_path / "shapes-40x32.draft/train/left over").mkdir(parents=True, exist_ok=True)
    folder = builtin.write_builtin(settings, tmp_path, no_progress)
    assert read_dataset(folder).classes == tuple(sorted(builtin.SHAPES))
    assert set(recorded_split(folder)) == {name for name in files(folder) if name.startswith(("train/", "val/"))}
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == [folder]


def test_second_process_waits_for_the_first_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "_save", None)  # a call fails
    folder = tmp_path / "shapes-40x32"

    def locked(file, how):
        assert (file.name, how) == (str(tmp_path / ".shapes-40x32.lock"), fcntl.LOCK_EX)
        folder.mkdir()  # by the process that has the lock

    monkeypatch.setattr(fcntl, "flock", locked)
    settings = DataSettings(builtin="shapes", images=40, image_size=32)
    assert builtin.write_builtin(settings, tmp_path, no_progress) == folder


@pytest.mark.parametrize("source", ["digits_folder", "shapes_folder"])
def test_a_source_is_written_once(source, request, monkeypatch):
    folder = request.getfixturevalue(source)
    monkeypatch.setattr(builtin, "_save", None)  # a call fails
    settings = {
        "digits_folder": DataSettings(builtin="digits"),
        "shapes_folder": DataSettings(builtin="shapes", images=40, image_size=32),
    }
    assert builtin.write_builtin(settings[source], folder.parent, no_progress) == folder


def test_other_settings_are_written_beside(tmp_path):
    folders = [
        builtin.write_builtin(DataSettings(builtin="shapes", images=images, image_size=side), tmp_path, no_progress)
        for images, side in ((20, 16), (24, 16), (20, 24))
    ]
    assert [len(recorded_split(folder)) for folder in folders] == [20, 24, 20]
    assert [size(read_dataset(folder).train[0]) for folder in folders] == [(16, 16), (16, 16), (24, 24)]


def test_writing_is_tracked(tmp_path):
    tracked = []

    def progress(items, title, length):
        tracked.extend([title, length])
        return items

    builtin.write_builtin(DataSettings(builtin="shapes", images=20, image_size=16), tmp_path, progress)
    assert tracked[1] == 20


def test_shapes_come_in_eight_classes_in_turn_and_all_differ():
    pictures = list(builtin.shapes(32, 48))
    assert [picture.class_name for picture in pictures[:8]] == [picture.class_name for picture in pictures[8:16]]
    assert Counter(picture.class_name for picture in pictures) == dict.fromkeys(builtin.SHAPES, 4)
    assert {picture.image.size for picture in pictures} == {(48, 48)}
    assert {picture.image.mode for picture in pictures} == {"RGB"}
    assert len({picture.image.tobytes() for picture in pictures}) == 32
    assert len({picture.name for picture in pictures}) == 32


def test_shapes_depend_on_seed_and_number_alone():
    first, again, other = (list(builtin.shapes(count, 32, seed)) for count, seed in ((8, 0), (16, 0), (8, 1)))
    random.seed(5)
    assert [picture.image.tobytes() for picture in first] == [picture.image.tobytes() for picture in again[:8]]
    assert not {picture.image.tobytes() for picture in first} & {picture.image.tobytes() for picture in other}


@pytest.mark.parametrize("shape", builtin.SHAPES)
def test_an_outline_touches_its_circle_and_stays_within(shape):
    corners = builtin._outline(shape, (30.0, 20.0), 10.0, 0.7)
    assert max(math.hypot(x - 30, y - 20) for x, y in corners) == pytest.approx(10, abs=0.05)


def test_shapes_with_equal_bounds_cover_different_areas():
    def area(shape):
        corners = builtin._outline(shape, (0.0, 0.0), 1.0, 0.0)
        following = [*corners[1:], corners[0]]
        return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(corners, following, strict=True))) / 2

    assert area("square") == pytest.approx(2)
    assert area("triangle") == pytest.approx(3 * math.sqrt(3) / 4)
    assert area("diamond") == pytest.approx(1)
    assert area("circle") == pytest.approx(math.pi, abs=0.01)

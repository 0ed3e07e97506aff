"""What the mill sees of MultiGrain: metrics to choose from, problems of the data, preparing, training, loading."""

import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from multigrain import trainable
from multigrain.data import DataError, DataSettings, read_dataset, untracked
from multigrain.spec import MultiGrainSpec, worker_problems

SPEC = MultiGrainSpec.model_validate(
    {
        "image_size": 32,
        "epochs": 1,
        "model": {"trunk": "narrow"},
        "batch": {"size": 24, "repeats": 2, "length_factor": 1.0},
    }
)


def write_images(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number * 5, 100, 200)).save(root / name)


SPLIT = ("train/a/0.png", "train/a/1.png", "train/b/0.png", "val/a/2.png", "val/a/3.png", "val/b/1.png")
COPIES = ("copies/original/200000.png", "copies/strong/200001.png")
PLAIN = {"top1": "max", "class_map": "max"}
ALL = {**PLAIN, "copy_map": "max", "mean_top1_copy_map": "max"}


@pytest.mark.parametrize("builtin", ["digits", "shapes"])
def test_built_in_sources_have_all_metrics(builtin):
    assert trainable.metrics(DataSettings(builtin=builtin)) == ALL


@pytest.mark.parametrize(("files", "expected"), [(SPLIT, PLAIN), ((*SPLIT, *COPIES), ALL)])
def test_metrics_of_a_folder_need_copies_where_they_say_so(tmp_path, files, expected):
    write_images(tmp_path, *files)
    assert trainable.metrics(DataSettings(folder=str(tmp_path))) == expected


def test_metrics_of_an_unusable_folder_tell_its_problems(tmp_path):
    with pytest.raises(DataError, match="must exist"):
        trainable.metrics(DataSettings(folder=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("images", [3, 20])
@pytest.mark.parametrize("copies", [(), COPIES])
def test_metrics_are_those_that_training_gives(tmp_path, images, copies):
    # Of three images of a class, one is held out: there is no other of its class to be found.
    files = [f"{name}/{number}.png" for name in ("a", "b") for number in range(images)]
    write_images(tmp_path / "images", *files, *copies)
    data = DataSettings(folder=str(tmp_path / "images"))
    (result,) = trainable.fit(SPEC, data, tmp_path / "run")
    assert set(trainable.metrics(data)) == {name for name in ALL if name in result.metrics}


def test_problems_of_the_layout_are_told_all_at_once(tmp_path):
    write_images(tmp_path, "train/a/0.png", "val/c/0.png", COPIES[0])
    data = DataSettings(folder=str(tmp_path))
    problems = trainable.data_problems(data, untracked)
    assert len(problems) == 3
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path)
    assert problems == caught.value.problems


def test_problems_of_the_images_are_told_all_at_once(tmp_path):
    write_images(tmp_path, *SPLIT, *COPIES)
    data = DataSettings(folder=str(tmp_path))
    assert trainable.data_problems(data, untracked) == []
    for name in (SPLIT[0], COPIES[1]):
        (tmp_path / name).write_bytes(b"")
    problems = trainable.data_problems(data, untracked)
    assert [name for problem in problems for name in (SPLIT[0], COPIES[1]) if name in problem] == [SPLIT[0], COPIES[1]]


def test_a_folder_that_may_not_be_read_is_a_problem_too(tmp_path, monkeypatch):
    monkeypatch.setattr(trainable, "read_dataset", Mock(side_effect=PermissionError(13, "not yours", str(tmp_path))))
    (problem,) = trainable.data_problems(DataSettings(folder=str(tmp_path)), untracked)
    assert str(tmp_path) in problem


def test_problems_are_looked_for_in_the_split_that_is_asked_for(tmp_path):
    write_images(tmp_path, "a/0.png", "a/1.png", "a/2.png", "a/3.png")
    assert trainable.data_problems(DataSettings(folder=str(tmp_path), val_share=0.25), untracked) == []
    assert trainable.data_problems(DataSettings(folder=str(tmp_path), val_share=0.7), untracked) != []


def test_a_built_in_source_has_no_problems_and_is_not_written_to_find_that_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trainable.data_problems(DataSettings(builtin="digits"), untracked) == []
    assert list(tmp_path.iterdir()) == []


def test_preparing_a_built_in_source_writes_it_once(tmp_path):
    data = DataSettings(builtin="shapes", images=20, image_size=16)
    prepared = trainable.prepare(data, tmp_path, untracked)
    assert prepared == trainable.prepare(data, tmp_path, untracked)
    assert len(read_dataset(tmp_path / "shapes-20x16").train) == 12
    assert prepared.folder == str(tmp_path / "shapes-20x16")
    assert trainable.data_problems(prepared, untracked) == []


@pytest.mark.parametrize(
    "data", [DataSettings(builtin="shapes", images=20, image_size=16), DataSettings(folder="images", val_share=0.3)]
)
def test_prepared_data_is_found_from_any_directory(tmp_path, monkeypatch, data):
    write_images(tmp_path / "images", "a/0.png", "a/1.png", "a/2.png")
    monkeypatch.chdir(tmp_path)
    prepared = trainable.prepare(data, (tmp_path / "data").relative_to(tmp_path), untracked)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert trainable.data_problems(prepared, untracked) == []
    assert prepared.val_share == data.val_share


def test_what_fit_trains_load_answers_with(tmp_path, shapes_folder):
    data = trainable.prepare(DataSettings(folder=str(shapes_folder)), tmp_path, untracked)
    (result,) = trainable.fit(SPEC, data, tmp_path / "run")
    assert set(ALL) <= set(result.metrics)
    example = trainable.example(data)
    assert list(example["image"]) == [path.read_bytes() for path in read_dataset(shapes_folder).val[:2]]
    answers = trainable.load(tmp_path / "run")(example)
    assert set(answers["class_name"]) <= set(read_dataset(shapes_folder).classes)
    # The accuracy that training told is that of the model that it left.
    paths = read_dataset(shapes_folder).val
    everything = example.iloc[:0].reindex(range(len(paths))).assign(image=[path.read_bytes() for path in paths])
    names = trainable.load(tmp_path / "run")(everything)["class_name"]
    assert np.mean([name == path.parent.name for name, path in zip(names, paths, strict=True)]) == pytest.approx(
        result.metrics["top1"]
    )


def test_an_experiment_file_is_checked_without_torch():
    program = "import sys, multigrain.trainable; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_worker_problems_and_settings_are_the_methods_own():
    assert trainable.Spec is MultiGrainSpec
    assert trainable.Data is DataSettings
    assert trainable.worker_problems is worker_problems

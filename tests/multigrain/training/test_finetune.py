"""Fine-tuning of p*: its recipe, what it leaves, how it goes on, how ranks share it, and what the mill sees of it."""

import itertools
import json
import math
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import ROOT
from PIL import Image
from ranks import start_ranks
from torch import distributed
from typer.testing import CliRunner

from grainmill import trainable
from grainmill.cli.app import app
from grainmill.config.experiment import load
from grainmill.config.yaml_document import Document
from multigrain import exponent
from multigrain.config.data import DataSettings
from multigrain.config.finetune import FinetuneSpec
from multigrain.config.training import MultiGrainSpec
from multigrain.data.dataset import Dataset, first_of_each_class
from multigrain.data.folders import read_dataset
from multigrain.data.loading import decode
from multigrain.data.transforms import evaluation_view, scale
from multigrain.exponent import worker_problems
from multigrain.export import inference
from multigrain.models import checkpoint
from multigrain.models.multigrain import network_of
from multigrain.training import finetune
from multigrain.training import fit as training
from multigrain.training.finetune import fit, rate
from multigrain.training.trainer import TrainingError

CPU = torch.device("cpu")
PRESET = ROOT / "search_spaces" / "exponent.yaml"
SIZE = 24
SHAPES = [(40, 30), (20, 40), (32, 32), (48, 24)]
"""Widths and heights of the files: at 24 pixels, maps of 24 x 18, 12 x 24, 24 x 24 and 24 x 12 pixels."""
CHANGES = {
    "plain": {"model": {"p": 2.5}, "evaluation": {"variants": {"exponents": [4]}}},
    "learnt": {"model": {"learn_p": True}, "optimizer": {"rate": 20.0, "ema": 0.5}},
    "maximum": {"model": {"p": math.inf}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of noise around a colour: 4, 4 and 1 images for training, 2 held out of each."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, (name, count) in enumerate({"ant": 4, "bee": 4, "cat": 1}.items()):
        colour = np.eye(3)[label] * 60
        for number in range(count + 2):
            width, height = SHAPES[(label + number) % len(SHAPES)]
            path = root / ("val" if number >= count else "train") / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = colour + rng.integers(0, 190, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def data(folder):
    return read_dataset(folder)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Folders with the checkpoints of networks that `fit` trained for two epochs, by the keys of `CHANGES`."""
    root = tmp_path_factory.mktemp("trained")
    for name, changes in CHANGES.items():
        settings = {
            "image_size": 32,
            "epochs": 2,
            "batch": {"size": 20, "repeats": 2},
            **changes,
            "model": {"trunk": "narrow", **changes["model"]},
        }
        list(training.fit(MultiGrainSpec.model_validate(settings), data, root / name, CPU))
    return {name: root / name for name in CHANGES}


@pytest.fixture
def spec(trained):
    """Settings with a rate that moves p far in steps of 4, 4 and 1 of 9 images."""

    def spec(source="plain", **changes):
        settings = {"image_size": SIZE, "epochs": 2, "images_per_class": 4, "rate": 20.0, **changes}
        return FinetuneSpec(checkpoint=str(trained[source]), **settings)

    return spec


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tuning_of(spec, data):
    return finetune._Tuning(spec, data, checkpoint.latest(Path(spec.checkpoint)), CPU)


# The recipe


def test_the_rate_is_that_of_the_recipe():
    steps = 12_500
    assert rate(FinetuneSpec(), 0) == 0.005
    assert rate(FinetuneSpec(), 0.5) == pytest.approx(0.00268, abs=5e-6)
    assert rate(FinetuneSpec(), (steps - 1) / steps) == pytest.approx(1.03e-6, abs=5e-9)
    assert rate(FinetuneSpec(rate=2.0, power=0.0), 0.9) == 2


def test_images_are_the_first_of_each_class_by_name():
    names = ["b/2", "a/3", "b/1", "a/1", "c/1", "a/2", "b/10", "b/3"]
    labels = tuple("abc".index(name[0]) for name in names)
    dataset = Dataset(("a", "b", "c"), tuple(map(Path, names)), labels, (), (), None)
    found = [names[index] for index in first_of_each_class(dataset, 2)]
    assert found == ["a/1", "a/2", "b/1", "b/10", "c/1"]
    assert len(first_of_each_class(dataset, 50)) == len(names)


def test_defaults_take_fifty_thousand_images_of_imagenet_in_12500_steps():
    assert FinetuneSpec().images_per_class * 1000 / FinetuneSpec().batch_size * FinetuneSpec().epochs == 12_500


def slow_loss(trunk_maps, labels, weight, bias, p):
    """Mean cross-entropy in double precision, from maps (C, h, w) of any size, p counted as 1 below 1."""
    p, losses = max(p, 1.0), []
    for features, label in zip(trunk_maps, labels, strict=True):
        pooled = [np.mean(np.maximum(channel, 1e-6) ** p) ** (1 / p) for channel in features]
        logits = weight @ np.array(pooled) + bias
        losses.append(math.log(sum(math.exp(logit - logits[label]) for logit in logits)))
    return sum(losses) / len(losses)


def slope(loss, p, step=1e-5):
    return (loss(p + step) - loss(p - step)) / (2 * step)


def slow_network(source, data):
    """The maps of the training images, whole at `SIZE` pixels, and the classifier, in double precision."""
    network = inference.read(source).answers.network.double()
    maps = []
    for path in data.train:
        view = evaluation_view(decode(path), "rect", SIZE).double()
        with torch.no_grad():
            maps.append(network.trunk((view[None] - network.mean) / network.std)[0].numpy())
    weight, bias = (parameter.detach().numpy() for parameter in network.classifier.parameters())
    return maps, weight, bias


def test_p_goes_the_way_of_a_slow_loop(data, spec, tmp_path):
    settings = spec(images_per_class=3, seed=5, batch_size=5, power=0.7, momentum=0.8)
    maps, weight, bias = slow_network(Path(settings.checkpoint), data)
    images = [0, 1, 2, 4, 5, 6, 8]  # three of 4, three of 4, the only one
    p, velocity, expected = 2.5, 0.0, []
    for epoch in range(2):
        order = np.random.default_rng((5, epoch)).permutation(images)
        losses = []
        for number, step in enumerate((order[:5], order[5:])):

            def loss(p, step=step):
                return slow_loss([maps[i] for i in step], [data.train_labels[i] for i in step], weight, bias, p)

            losses.append(loss(p))
            velocity = 0.8 * velocity + slope(loss, p)
            p -= 20 * (1 - (2 * epoch + number) / 4) ** 0.7 * velocity
        expected.append((p, sum(losses) / 2))
    results = list(fit(settings, data, tmp_path, CPU))
    assert [result.epoch for result in results] == [1, 2]
    for result, (p, loss) in zip(results, expected, strict=True):
        assert result.metrics["p"] == pytest.approx(p, abs=2e-5)
        assert result.metrics["loss"] == pytest.approx(loss, abs=2e-5)
    moves = (abs(expected[0][0] - 2.5), abs(expected[1][0] - expected[0][0]))
    assert min(moves) > 0.01, "p must really move"
    assert p > 1


@pytest.mark.parametrize("p", [1.1, 1.7, 4.0])
def test_the_gradient_of_p_is_that_of_the_cross_entropy(data, spec, monkeypatch, p):
    settings, chosen = spec(), [0, 1, 5, 8]
    monkeypatch.setattr(finetune, "scale", lambda pixels: scale(pixels).double())
    tuning = tuning_of(settings, data)
    tuning.network.double()
    with torch.no_grad():
        tuning.p.fill_(p)
    views = finetune._Images([(data.train[index], data.train_labels[index]) for index in chosen], SIZE)
    assert [tuple(pixels.shape) for pixels, _ in views] == [(3, 18, 24), (3, 24, 12), (3, 24, 24), (3, 24, 24)]
    loss = tuning._step(views, len(chosen)).item()
    maps, weight, bias = slow_network(Path(settings.checkpoint), data)

    def slow(p):
        return slow_loss([maps[i] for i in chosen], [data.train_labels[i] for i in chosen], weight, bias, p)

    assert loss == pytest.approx(slow(p), abs=1e-12)
    assert tuning.p.grad.item() == pytest.approx(slope(slow, p), abs=1e-9)
    assert abs(tuning.p.grad.item()) > 1e-5


def test_p_counts_as_1_below_1(data, spec):
    tuning = tuning_of(spec(), data)
    with torch.no_grad():
        tuning.p.fill_(0.4)
    state = tuning.state(1)
    assert state.state["spec"]["model"]["p"] == 1.0
    again = finetune._Tuning(tuning.spec, data, state, CPU)
    again.restore(state)
    assert again.p.item() == tuning.p.item(), "a later start goes on from below 1"
    assert tuning.result(state).metrics["p"] == 1.0
    image = torch.rand(1, 3, 24, 24)
    at_one, _ = network_of(state)
    with torch.no_grad():
        torch.testing.assert_close(tuning.network(image).logits, at_one.eval()(image).logits)


@pytest.mark.parametrize(("p", "given"), [(150.0, {}), (2.5, {"rate": 1e38}), (math.nan, {})])
def test_a_p_out_of_range_ends_the_run_with_advice(data, spec, p, given):
    tuning = tuning_of(spec(**given), data)
    with torch.no_grad():
        tuning.p.fill_(p)
    with pytest.raises(TrainingError, match="after epoch 1; lower rate"):
        tuning.train_epoch(0)


# What it leaves


def test_nothing_but_p_changes(data, spec, tmp_path):
    settings = spec()
    source = Path(settings.checkpoint)
    before = contents(source)
    *_, result = fit(settings, data, tmp_path, CPU)
    left, was = checkpoint.latest(tmp_path), checkpoint.latest(source)
    expected = {name: tensor for name, tensor in was.model.items() if name.startswith("network.")}
    assert left.model.keys() == expected.keys()
    assert sum("running_" in name or "num_batches" in name for name in expected) == 3 * 7
    assert all(torch.equal(tensor, expected[name]) for name, tensor in left.model.items())
    changed = {"p": result.metrics["p"], "learn_p": False}
    assert left.state["spec"] == {
        **was.state["spec"],
        "model": {**was.state["spec"]["model"], **changed},
        "evaluation": {**was.state["spec"]["evaluation"], "transform": "rect", "size": SIZE},
    }
    assert result.metrics["p"] != 2.5
    assert contents(source) == before


def test_the_result_is_loaded_with_its_p_its_size_and_whole_images(data, spec, tmp_path):
    *_, result = fit(spec(), data, tmp_path, CPU)
    served = inference.read(tmp_path)
    assert (served.facts["p"], served.facts["transform"], served.facts["size"]) == (result.metrics["p"], "rect", SIZE)
    assert not list(served.answers.network.pool.parameters())
    answers = inference.load(tmp_path)(pd.DataFrame({"image": [path.read_bytes() for path in data.val]}))
    right = [data.classes[label] == name for label, name in zip(data.val_labels, answers["class_name"], strict=True)]
    assert np.mean(right) == result.metrics["top1"]
    assert {"top1", "class_map", "p", "loss"} == set(result.metrics)
    assert all(type(value) is float for value in result.metrics.values())


def test_a_learnt_p_is_where_it_starts_and_averaged_weights_are_used(data, spec, tmp_path):
    settings = spec("learnt", rate=1e-30, epochs=1)
    was = checkpoint.latest(Path(settings.checkpoint))
    start = was.model["ema.pool.p"].item()
    assert start != was.model["network.pool.p"].item() != 3
    (result,) = fit(settings, data, tmp_path, CPU)
    assert result.metrics["p"] == max(1, start)
    left = checkpoint.latest(tmp_path)
    averaged = {"network." + name[4:]: tensor for name, tensor in was.model.items() if name.startswith("ema.")}
    assert left.model.keys() == averaged.keys() - {"network.pool.p"}
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in left.model.items())
    assert not torch.equal(left.model["network.classifier.weight"], was.model["network.classifier.weight"])
    assert inference.read(tmp_path).answers.network.pool.p == result.metrics["p"]


def test_the_maximum_starts_from_three(data, spec, tmp_path):
    (result,) = fit(spec("maximum", rate=1e-30, epochs=1), data, tmp_path, CPU)
    assert result.metrics["p"] == 3


def test_a_result_can_be_tuned_again(data, spec, tmp_path):
    *_, first = fit(spec(), data, tmp_path / "first", CPU)
    again = spec().model_copy(update={"checkpoint": str(tmp_path / "first"), "image_size": 32, "rate": 1e-30})
    *_, second = fit(again, data, tmp_path / "second", CPU)
    assert second.metrics["p"] == pytest.approx(first.metrics["p"])
    assert inference.read(tmp_path / "second").facts["size"] == 32


# Going on


def test_a_run_interrupted_after_an_epoch_ends_as_if_it_had_not_been(data, spec, tmp_path):
    settings = spec()
    whole = list(fit(settings, data, tmp_path / "whole", CPU))
    (first,) = itertools.islice(fit(settings, data, tmp_path / "cut", CPU), 1)
    torch.manual_seed(99)
    assert list(fit(settings, data, tmp_path / "cut", CPU)) == [first, whole[1]] == whole
    one, other = checkpoint.latest(tmp_path / "whole"), checkpoint.latest(tmp_path / "cut")
    assert one.state == other.state
    assert one.optimizer["state"][0]["momentum_buffer"].item() != 0
    assert one.optimizer == other.optimizer
    assert list(fit(settings, data, tmp_path / "cut", CPU)) == [whole[1]], "nothing is left to do"


@pytest.mark.parametrize("last", range(1, 7))
def test_a_run_that_is_told_to_end_does_so_at_once_and_repeats_no_step(data, spec, tmp_path, monkeypatch, last):
    settings, steps, step = spec(images_per_class=3, batch_size=3), [], finetune._Tuning._step
    assert len(first_of_each_class(data, 3)) == 7, "three steps an epoch"
    whole = list(fit(settings, data, tmp_path / "whole", CPU))
    monkeypatch.setattr(finetune._Tuning, "_step", lambda *args: steps.append(args) or step(*args))
    before = list(fit(settings, data, tmp_path / "told", CPU, lambda: len(steps) >= last))
    assert len(steps) == checkpoint.latest(tmp_path / "told").state["steps"] == last
    assert before == whole[: (last - 1) // 3]
    after = list(fit(settings, data, tmp_path / "told", CPU))
    assert len(steps) == 6
    assert {result.epoch: result for result in before + after} == {result.epoch: result for result in whole}
    one, other = checkpoint.latest(tmp_path / "whole"), checkpoint.latest(tmp_path / "told")
    assert (one.state, one.optimizer) == (other.state, other.optimizer)


def test_it_goes_on_without_the_network_that_it_began_with(data, spec, trained, tmp_path):
    (tmp_path / "trained").symlink_to(trained["plain"])
    settings = spec().model_copy(update={"checkpoint": str(tmp_path / "trained")})
    (first,) = itertools.islice(fit(settings, data, tmp_path / "run", CPU), 1)
    (tmp_path / "trained").unlink()
    again, second = fit(settings, data, tmp_path / "run", CPU)
    assert again == first
    assert second.metrics == list(fit(spec(), data, tmp_path / "whole", CPU))[1].metrics


def test_random_numbers_are_neither_drawn_nor_needed(data, spec, tmp_path):
    tuning = tuning_of(spec(), data)
    before = torch.random.get_rng_state()
    tuning.train_epoch(0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epochs": 3}, {"rate": 0.25}, {"image_size": 32}])
def test_other_settings_are_refused(data, spec, tmp_path, change):
    next(fit(spec(), data, tmp_path, CPU))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"settings it began with, but {tmp_path} holds others; use another"):
        next(fit(spec(**change), data, tmp_path, CPU))
    assert contents(tmp_path) == before


def test_the_folder_of_a_training_is_refused(data, spec):
    settings = spec()
    before = contents(Path(settings.checkpoint))
    with pytest.raises(ValueError, match="holds others; use another"):
        next(fit(settings, data, Path(settings.checkpoint), CPU))
    assert contents(Path(settings.checkpoint)) == before


def test_loading_processes_change_nothing(data, spec, tmp_path):
    found = [list(fit(spec(loaders=count), data, tmp_path / str(count), CPU)) for count in (0, 2)]
    assert found[0] == found[1]


def test_another_seed_is_another_order(data, spec, tmp_path):
    found = [next(fit(spec(seed=seed), data, tmp_path / str(seed), CPU)).metrics["p"] for seed in (0, 1)]
    assert found[0] != found[1]


# What it refuses


@pytest.mark.parametrize("place", [None, "nowhere", "empty", "f" * 5000])
def test_a_network_is_needed(data, tmp_path, place):
    (tmp_path / "empty" / "draft-step-00000001").mkdir(parents=True)
    (tmp_path / "empty" / "draft-step-00000001" / "MANIFEST.json").touch()
    (tmp_path / "empty" / "step-00000002").mkdir()
    settings = FinetuneSpec(checkpoint=place and str(tmp_path / place))
    ((key, problem),) = worker_problems(settings, 2)
    assert key == "checkpoint"
    assert problem.startswith("must be a folder with the checkpoints of a trained network, got ")
    assert "; name that of a trial, such as " in problem
    if place in {None, "nowhere"}:
        with pytest.raises(FileNotFoundError, match=r"holds no intact one; name the folder"):
            next(fit(settings, data, tmp_path / "run", CPU))


def test_a_network_that_is_damaged_is_told(data, trained, tmp_path):
    for directory in trained["plain"].iterdir():
        (tmp_path / directory.name).mkdir()
        for file in directory.iterdir():
            (tmp_path / directory.name / file.name).write_bytes(file.read_bytes())
        (tmp_path / directory.name / "model.safetensors").write_bytes(b"")
    settings = FinetuneSpec(checkpoint=str(tmp_path))
    with (
        pytest.warns(UserWarning, match=r"model\.safetensors differ"),
        pytest.raises(FileNotFoundError, match="no intact one; name the folder of a trial that has trained"),
    ):
        next(fit(settings, data, tmp_path / "run", CPU))


@pytest.mark.parametrize("classes", [("ant", "bee", "dog"), ("ant", "cat", "bee"), ("ant", "bee")])
def test_other_classes_are_refused(data, spec, tmp_path, classes):
    other = Dataset(**{**vars(data), "classes": classes})
    with pytest.raises(ValueError, match=f"network's 3 classes, but have {len(classes)}.*; use the data that"):
        next(fit(spec(), other, tmp_path, CPU))
    assert not contents(tmp_path)


def test_workers_share_a_step_evenly(spec):
    assert [worker_problems(spec(), workers) for workers in (1, 2, 4)] == [[]] * 3
    for workers in (3, 8):
        ((key, problem),) = worker_problems(spec(), workers)
        assert key == ""
        assert f"multiple of the workers, got 4 and {workers}" in problem


def test_the_path_of_the_checkpoint_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert FinetuneSpec(checkpoint="runs/x").checkpoint == str(tmp_path / "runs/x")
    assert FinetuneSpec().checkpoint is None


# Two ranks


def of_one_rank(rank, meeting, folder, settings):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    saves, save = [], checkpoint.save
    checkpoint.save = lambda *args: saves.append(rank) or save(*args)
    data, run = read_dataset(Path(folder)), Path(meeting) / "run"
    results = [result.metrics for result in fit(FinetuneSpec(**settings), data, run, CPU)]
    again = [result.metrics for result in fit(FinetuneSpec(**settings), data, run, CPU)]
    (Path(meeting) / f"{rank}.json").write_text(json.dumps([results, again, saves]))
    distributed.destroy_process_group()


def test_two_ranks_do_what_one_process_does(data, folder, spec, tmp_path):
    settings = spec()  # 9 images in steps of 4, 4 and 1: the second rank has none of the last
    start_ranks(of_one_rank, (str(tmp_path), str(folder), settings.model_dump()))
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one[:2] == two[:2]
    assert one[1] == one[0][-1:]
    assert (one[2], two[2]) == ([0, 0], [])
    alone = [result.metrics for result in fit(settings, data, tmp_path / "alone", CPU)]
    assert len(one[0]) == len(alone) == 2
    for shared, single in zip(one[0], alone, strict=True):
        assert shared == pytest.approx(single, abs=1e-6)


# The mill's side


def validate(data, checkpoint_folder):
    arguments = [f"data.folder={data}", f"base.checkpoint={checkpoint_folder}"]
    command = ["validate", str(PRESET), *itertools.chain(*(("--set", argument) for argument in arguments))]
    return CliRunner(env={"COLUMNS": "9999"}).invoke(app, command)


def test_the_mill_knows_it_by_name():
    assert trainable.find("multigrain-exponent") is exponent
    assert all(hasattr(exponent, member) for member in (*trainable.REQUIRED, *trainable.DEFAULTS))


def test_the_names_that_registered_models_and_indexes_hold_stay():
    assert trainable.find("multigrain").__name__ == "multigrain.trainable"
    assert trainable.find("multigrain.exponent") is trainable.find("multigrain-exponent")


def test_the_preset_is_right_but_for_its_folders(folder, trained, tmp_path):
    assert validate(folder, trained["plain"]).exit_code == 0
    wrong = validate(folder, tmp_path)
    assert wrong.exit_code == 2
    assert f"must be a folder with the checkpoints of a trained network, got {tmp_path}; name that" in wrong.stderr


def test_the_preset_has_the_published_figures(folder, trained):
    experiment = load(PRESET, [f"data.folder={folder}", f"base.checkpoint={trained['plain']}"])
    assert experiment.base == FinetuneSpec(checkpoint=str(trained["plain"]))
    assert FinetuneSpec(image_size=500, batch_size=4, rate=0.005, power=0.9, momentum=0.9) == FinetuneSpec()
    assert experiment.objective == {"top1": "max"}
    assert experiment.resources.gpus_per_worker == 1
    tree = Document(PRESET).tree
    assert tree["data"] == {"folder": "/data/imagenet"}
    base = PRESET.read_text().partition("base:\n")[2].partition("objective:")[0]
    settings = re.findall(r"^ +(\w+): +\S+(.*)$", base, re.MULTILINE)
    assert {name for name, _ in settings} == set(FinetuneSpec.model_fields) - {"loaders"}
    assert [name for name, comment in settings if not re.search(r"\[(P|R|-)", comment)] == ["checkpoint"]


def test_an_experiment_file_is_checked_without_torch(folder, trained):
    program = f"""
import sys
import grainmill.cli.app
overrides = ["--set", "data.folder={folder}", "--set", "base.checkpoint={trained["plain"]}"]
grainmill.cli.app.app(["validate", {str(PRESET)!r}, *overrides], standalone_mode=False)
print("multigrain.exponent" in sys.modules, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=PRESET.parent, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "True False"


def test_what_fit_tunes_load_answers_with(folder, spec, tmp_path):
    source = DataSettings(folder=str(folder))
    results = list(exponent.fit(spec(), source, tmp_path))
    assert set(exponent.metrics(source)) <= set(results[-1].metrics)
    answers = exponent.load(tmp_path)(exponent.example(source))
    assert set(answers["class_name"]) <= {"ant", "bee", "cat"}

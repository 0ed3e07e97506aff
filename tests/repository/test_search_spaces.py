"""The experiment files of the repository, with a small folder in place of their own."""

import re
from pathlib import Path

import pytest

from grainmill.config.experiment import load
from grainmill.config.yaml_document import Document
from multigrain.config.training import MultiGrainSpec, worker_problems

SPACES = Path(__file__).parents[2] / "search_spaces"
PRESETS = ["imagenet", "lambda_p_grid", "modern"]
PUBLISHED = MultiGrainSpec()


@pytest.fixture
def preset(shapes_folder):
    def preset(name):
        return load(SPACES / f"{name}.yaml", [f"data.folder={shapes_folder}"])

    return preset


def leaves(tree, prefix=""):
    """The values of a tree by dotted path."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def changed(spec):
    """What is not as published."""
    published = leaves(PUBLISHED.model_dump())
    return {path: value for path, value in leaves(spec.model_dump()).items() if value != published[path]}


def test_there_is_a_test_for_every_file():
    assert sorted(file.stem for file in SPACES.glob("*.yaml")) == sorted(["demo", "exponent", *PRESETS])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_right_but_for_its_folder(name, preset):
    experiment = preset(name)
    assert experiment.name == name.replace("_", "-")
    assert Document(SPACES / f"{name}.yaml").tree["data"] == {"folder": "/data/imagenet"}
    assert experiment.resources.gpus_per_worker == 1


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_on_one_two_and_four_gpus(name, workers, preset):
    assert worker_problems(preset(name).base, workers) == []


def test_imagenet_is_the_papers_setting_as_it_ran():
    # 77.4 top-1 was reached with even negatives from each GPU, and in fp32.
    tree = Document(SPACES / "imagenet.yaml").tree
    spec = MultiGrainSpec.model_validate(tree["base"])
    assert changed(spec) == {
        "loss.negatives": "reference",
        "loss.negatives_from": "rank",
        "evaluation.size": 224,
        "compute.precision": "fp32",
    }
    assert (spec.epochs, spec.batch.size, spec.batch.repeats) == (120, 504, 3)
    assert "space" not in tree


def test_every_setting_of_imagenet_has_a_source():
    base = (SPACES / "imagenet.yaml").read_text().partition("base:\n")[2].partition("objective:")[0]
    settings = re.findall(r"^ +(\w+): +\S+(.*)$", base, re.MULTILINE)
    assert len(settings) > 30
    assert [name for name, comment in settings if not re.search(r"\[(P|R|-)", comment)] == []


def test_the_grid_tries_every_lambda_of_figure_5_and_1_with_both_p(preset):
    experiment = preset("lambda_p_grid")
    assert experiment.space["loss.weight"].values == (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    assert experiment.space["model.p"].values == (1.0, 3.0)
    assert (experiment.search.sampler, experiment.search.scheduler) == ("grid", "none")
    assert experiment.search.trials == 6 * 2
    assert experiment.reference == {"loss.weight": 0.5, "model.p": 3.0}


def test_the_grid_has_all_else_as_imagenet_has_it(preset):
    grid, imagenet = preset("lambda_p_grid"), preset("imagenet")
    assert grid.base == imagenet.base
    assert grid.resources.retrain_workers == imagenet.resources.retrain_workers


def test_modern_searches_what_the_loss_and_the_views_are(preset):
    experiment = preset("modern")
    assert {"loss.weight", "model.p", "optimizer.rate"} < set(experiment.space)
    assert any(name.startswith("augment.") for name in experiment.space)
    for setting in ({"augment.randaugment": 15, "augment.mixup": 0.2}, experiment.reference):
        assert experiment.spec(setting).batch.repeats == 4
    assert experiment.base.optimizer.warmup < experiment.search.grace_epochs < experiment.base.epochs

import json
import math

import pytest
from pydantic import ValidationError

from multigrain.spec import MultiGrainSpec, worker_problems

PAPER = {
    "image_size": 224,
    "epochs": 120,
    "seed": 0,
    "model": {"trunk": "resnet50", "p": 3.0},
    "loss": {
        "weight": 0.5,
        "margin": 0.2,
        "beta": 1.2,
        "negatives": "distance_weighted",
        "cutoff": 0.5,
        "nonzero_loss_cutoff": 1.4,
    },
    "batch": {"size": 504, "repeats": 3, "length_factor": 2.0},
    "augment": {"policy": "full", "crop": 0.08, "flip": 0.5, "jitter": 0.3, "lighting": 0.1, "rotation": 15.0},
    "optimizer": {"rate": 0.2, "beta_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "step"},
}


def test_the_defaults_are_the_papers_setting():
    assert MultiGrainSpec().model_dump() == PAPER


def test_a_spec_comes_back_from_its_json():
    spec = MultiGrainSpec(seed=3, loss={"weight": 1}, batch={"repeats": 1, "size": 7}, model={"trunk": "narrow"})
    assert MultiGrainSpec(**json.loads(json.dumps(spec.model_dump()))) == spec
    assert json.loads(spec.model_dump_json()) == spec.model_dump()


@pytest.mark.parametrize("group", [None, "model", "loss", "batch", "augment", "optimizer"])
def test_unknown_keys_are_errors(group):
    settings = {"colour": 1} if group is None else {group: {"colour": 1}}
    with pytest.raises(ValidationError, match="colour"):
        MultiGrainSpec(**settings)


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        (None, "epochs", "120"),
        (None, "epochs", 120.0),
        (None, "epochs", True),
        (None, "seed", None),
        ("model", "p", "3"),
        ("model", "p", True),
        ("model", "trunk", 50),
        ("loss", "weight", "0.5"),
        ("loss", "weight", False),
        ("batch", "size", 504.0),
        ("augment", "flip", "0.5"),
        ("optimizer", "rate", "0.2"),
    ],
)
def test_values_of_another_type_are_errors(group, key, value):
    with pytest.raises(ValidationError, match=key):
        MultiGrainSpec(**({key: value} if group is None else {group: {key: value}}))


@pytest.mark.parametrize(
    ("group", "key", "good", "bad"),
    [
        (None, "image_size", [16, 500], [15, -1]),
        (None, "epochs", [1], [0, -1]),
        (None, "seed", [0, 2**31], [-1]),
        ("model", "trunk", ["narrow", "resnet18", "resnet152"], ["vgg16", ""]),
        ("model", "p", [1.0, 100.0, 3], [0.99, 100.1, math.nan, math.inf]),
        ("loss", "weight", [0.0, 0.5, 1.0], [-0.1, 1.1, math.nan]),
        ("loss", "margin", [0.01], [0.0, -0.2, math.nan, math.inf]),
        ("loss", "beta", [0.01], [0.0, -1.2, math.nan, math.inf]),
        ("loss", "negatives", ["uniform", "distance_weighted"], ["hardest"]),
        ("loss", "cutoff", [0.1], [0.0, math.nan]),
        ("loss", "nonzero_loss_cutoff", [1.0], [0.0, math.inf]),
        ("batch", "size", [3, 512 * 3], [0, -3]),
        ("batch", "repeats", [2, 3], [0, -3]),
        ("batch", "length_factor", [0.5], [0.0, -2.0, math.inf]),
        ("augment", "policy", ["torch", "full", "copy"], ["none"]),
        ("augment", "crop", [0.01, 1.0], [0.0, 1.1]),
        ("augment", "flip", [0.0, 1.0], [-0.1, 1.1]),
        ("augment", "jitter", [0.0, 0.99], [-0.1, 1.0]),
        ("augment", "lighting", [0.0, 1.0], [-0.1, 1.1]),
        ("augment", "rotation", [0.0, 180.0], [-1.0, 181.0]),
        ("optimizer", "rate", [1e-4], [0.0, -0.2, math.nan, math.inf]),
        ("optimizer", "beta_rate", [1e-4], [0.0, -0.1, math.nan]),
        ("optimizer", "momentum", [0.0, 0.99], [-0.1, 1.0]),
        ("optimizer", "weight_decay", [0.0, 1.0], [-1e-4, math.nan, math.inf]),
        ("optimizer", "schedule", ["step", "cosine"], ["linear"]),
    ],
)
def test_values_out_of_range_are_errors(group, key, good, bad):
    for value in good:
        spec = MultiGrainSpec(**({key: value} if group is None else {group: {key: value}}))
        assert getattr(spec if group is None else getattr(spec, group), key) == value
    for value in bad:
        with pytest.raises(ValidationError, match=key):
            MultiGrainSpec(**({key: value} if group is None else {group: {key: value}}))


def test_a_spec_is_frozen():
    spec = MultiGrainSpec()
    with pytest.raises(ValidationError, match="frozen"):
        spec.epochs = 3
    with pytest.raises(ValidationError, match="frozen"):
        spec.loss.weight = 1.0
    assert spec == MultiGrainSpec()


@pytest.mark.parametrize(
    ("size", "repeats", "advice"),
    # 513 is nearer to 512 than 510 is; no less than one group will do.
    [(512, 3, 513), (511, 3, 510), (1, 3, 3), (7, 5, 5)],
)
def test_a_batch_of_broken_groups_is_refused_with_the_nearest_whole_one(size, repeats, advice):
    with pytest.raises(ValidationError, match=rf"multiple of batch\.repeats, .* set batch\.size to {advice}\b"):
        MultiGrainSpec(batch={"size": size, "repeats": repeats})
    assert MultiGrainSpec(batch={"size": advice, "repeats": repeats}).batch.size == advice


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.99])
def test_single_views_are_refused_unless_the_margin_loss_has_no_weight(weight):
    with pytest.raises(ValidationError, match=r"loss\.weight must be 1 where batch\.repeats is 1"):
        MultiGrainSpec(batch={"repeats": 1}, loss={"weight": weight})
    assert MultiGrainSpec(batch={"repeats": 1}, loss={"weight": 1.0}).batch.repeats == 1
    assert MultiGrainSpec(batch={"repeats": 2}, loss={"weight": weight}).loss.weight == weight


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6, 7, 8, 168])
def test_workers_that_share_whole_groups_are_no_problem(workers):
    assert worker_problems(MultiGrainSpec(), workers) == []


@pytest.mark.parametrize(("workers", "advice"), [(5, 510), (16, 480), (400, 1200)])
def test_workers_that_would_break_groups_are_told_the_nearest_size(workers, advice):
    # 504 = 33.6 x 15 = 10.5 x 48 = 0.42 x 1200; a half goes to the even neighbour, and one group each is the least.
    (problem,) = worker_problems(MultiGrainSpec(), workers)
    assert f"got 504 and 3 x {workers}; set batch.size to {advice}" in problem
    assert worker_problems(MultiGrainSpec(batch={"size": advice}), workers) == []

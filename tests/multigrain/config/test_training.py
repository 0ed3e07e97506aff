import json
import math
import sys

import pytest
from pydantic import ValidationError

from multigrain.config.training import MultiGrainSpec, worker_problems

PAPER = {
    "image_size": 224,
    "epochs": 120,
    "seed": 0,
    "model": {"trunk": "resnet50", "weights": "random", "p": 3.0, "learn_p": False, "batchnorm": "local"},
    "loss": {
        "weight": 0.5,
        "margin": 0.2,
        "beta": 1.2,
        "normalise": "active",
        "negatives": "distance_weighted",
        "negatives_from": "step",
        "cutoff": 0.5,
        "nonzero_loss_cutoff": 1.4,
        "dimension": 0,
        "entropy": 0.0,
    },
    "batch": {"size": 504, "repeats": 3, "length_factor": 2.0, "accumulate": 1},
    "augment": {
        "policy": "full",
        "crop": 0.08,
        "ratio": 4 / 3,
        "flip": 0.5,
        "brightness": 0.3,
        "contrast": 0.3,
        "saturation": 0.3,
        "lighting": 0.1,
        "grey": 0.0,
        "randaugment": 0,
        "rotation": 15.0,
        "blur": 0.3,
        "jpeg": 0.3,
        "mixup": 0.0,
    },
    "optimizer": {
        "algorithm": "sgd",
        "rate": 0.2,
        "beta_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "decay_all": True,
        "schedule": "step",
        "warmup": 0.0,
        "clip": 0.0,
        "ema": 0.0,
    },
    "evaluation": {
        "transform": "crop",
        "size": None,
        "variants": {"sizes": (), "exponents": (), "whiten": False},
    },
    "compute": {"precision": "auto", "compile": False, "loaders": None, "checkpoint_steps": 1000},
}


def test_the_defaults_are_the_papers_setting():
    assert MultiGrainSpec().model_dump() == PAPER


def test_a_spec_comes_back_from_its_json():
    spec = MultiGrainSpec(seed=3, loss={"weight": 1}, batch={"repeats": 1, "size": 7}, model={"trunk": "narrow"})
    assert MultiGrainSpec(**json.loads(json.dumps(spec.model_dump()))) == spec
    assert json.loads(spec.model_dump_json()) == spec.model_dump(mode="json")


@pytest.mark.parametrize("group", [None, "model", "loss", "batch", "augment", "optimizer", "evaluation", "compute"])
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
        (
            "model",
            "trunk",
            ["narrow", "resnet18", "resnext50_32x4d", "wide_resnet101_2", "timm/legacy_senet154", "timm/pnasnet5large"],
            ["vgg16", "", "timm/", "timm/resnot50", "senet154"],
        ),
        ("model", "p", [1.0, 100.0, 3, math.inf], [0.99, 100.1, math.nan, -math.inf]),
        ("model", "batchnorm", ["local", "sync", "frozen"], ["none"]),
        ("loss", "weight", [0.0, 0.5, 1.0], [-0.1, 1.1, math.nan]),
        ("loss", "margin", [0.01], [0.0, -0.2, math.nan, math.inf]),
        ("loss", "beta", [0.01], [0.0, -1.2, math.nan, math.inf]),
        ("loss", "normalise", ["active", "triplets", "pairs"], ["mean"]),
        ("loss", "negatives", ["uniform", "distance_weighted", "reference"], ["hardest"]),
        ("loss", "negatives_from", ["step", "rank"], ["image"]),
        ("loss", "dimension", [0, 2048], [-1, 2.5]),
        ("loss", "entropy", [0.0, 30.0], [-0.1, math.nan, math.inf]),
        ("loss", "cutoff", [0.1], [0.0, math.nan]),
        ("loss", "nonzero_loss_cutoff", [1.0], [0.0, math.inf]),
        ("batch", "size", [6, 512 * 3], [0, -3]),
        ("batch", "repeats", [2, 3], [0, -3]),
        ("batch", "length_factor", [0.5], [0.0, -2.0, math.inf]),
        ("batch", "accumulate", [1, 4], [0, 0.5]),
        ("augment", "policy", ["torch", "full", "copy", "senet", "autoaugment"], ["none"]),
        ("augment", "ratio", [1.0, 2.0], [0.9, math.nan, math.inf]),
        ("augment", "brightness", [0.0, 0.99], [-0.1, 1.0]),
        ("augment", "contrast", [0.0, 0.99], [-0.1, 1.0]),
        ("augment", "saturation", [0.0, 0.99], [-0.1, 1.0]),
        ("augment", "grey", [0.0, 1.0], [-0.1, 1.1]),
        ("augment", "randaugment", [0, 30], [-1, 31, 5.5]),
        ("augment", "blur", [0.0, 1.0], [-0.1, 1.1]),
        ("augment", "jpeg", [0.0, 1.0], [-0.1, 1.1]),
        ("augment", "mixup", [0.0, 2.0], [-0.1, math.inf]),
        ("augment", "crop", [0.01, 1.0], [0.0, 1.1]),
        ("augment", "flip", [0.0, 1.0], [-0.1, 1.1]),
        ("augment", "lighting", [0.0, 1.0], [-0.1, 1.1]),
        ("augment", "rotation", [0.0, 180.0], [-1.0, 181.0]),
        ("optimizer", "rate", [1e-4], [0.0, -0.2, math.nan, math.inf]),
        ("optimizer", "beta_rate", [1e-4], [0.0, -0.1, math.nan]),
        ("optimizer", "momentum", [0.0, 0.99], [-0.1, 1.0]),
        ("optimizer", "weight_decay", [0.0, 1.0], [-1e-4, math.nan, math.inf]),
        ("optimizer", "schedule", ["step", "cosine"], ["linear"]),
        ("optimizer", "algorithm", ["sgd"], ["lamb"]),
        ("optimizer", "warmup", [0.0, 119.5], [-1.0, 120.0, math.nan]),
        ("optimizer", "clip", [0.0, 1.0], [-1.0, math.inf]),
        ("optimizer", "ema", [0.0, 0.9999], [-0.1, 1.0]),
        ("evaluation", "transform", ["crop", "rect"], ["centre"]),
        ("evaluation", "size", [None, 16, 500], [15, 224.0]),
        ("compute", "precision", ["auto", "fp32", "bf16", "fp16"], ["fp8"]),
        ("compute", "loaders", [None, 0, 16], [-1, 1.5]),
        ("compute", "checkpoint_steps", [1], [0]),
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
    # 513 is nearer to 512 than 510 is; no less than two groups will do.
    [(512, 3, 513), (511, 3, 510), (1, 3, 6), (7, 5, 10)],
)
def test_a_batch_of_broken_groups_is_refused_with_the_nearest_whole_one(size, repeats, advice):
    with pytest.raises(
        ValidationError, match=rf"multiple of batch\.repeats x batch\.accumulate, .* set batch\.size to {advice}\b"
    ):
        MultiGrainSpec(batch={"size": size, "repeats": repeats})
    assert MultiGrainSpec(batch={"size": advice, "repeats": repeats}).batch.size == advice


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.99])
def test_single_views_are_refused_unless_the_margin_loss_has_no_weight(weight):
    with pytest.raises(ValidationError, match=r"loss\.weight must be 1 where batch\.repeats is 1"):
        MultiGrainSpec(batch={"repeats": 1}, loss={"weight": weight})
    assert MultiGrainSpec(batch={"repeats": 1}, loss={"weight": 1.0}).batch.repeats == 1
    assert MultiGrainSpec(batch={"repeats": 2}, loss={"weight": weight}).loss.weight == weight


@pytest.mark.parametrize("repeats", [2, 3])
def test_a_batch_of_one_image_is_refused_where_the_margin_loss_needs_others(repeats):
    batch = {"size": repeats, "repeats": repeats}
    with pytest.raises(ValidationError, match=rf"set batch\.size to {2 * repeats} or more"):
        MultiGrainSpec(batch=batch, loss={"weight": 0.5})
    assert MultiGrainSpec(batch=batch, loss={"weight": 1.0}).batch.size == repeats
    assert MultiGrainSpec(batch={**batch, "size": 2 * repeats}, loss={"weight": 0.5}).batch.repeats == repeats


def test_negatives_of_the_same_rank_need_two_images_on_each():
    batch, loss = {"size": 12, "repeats": 3}, {"negatives_from": "rank"}
    assert worker_problems(MultiGrainSpec(batch=batch, loss=loss), 2) == []
    (problem,) = worker_problems(MultiGrainSpec(batch=batch, loss=loss), 4)
    assert "got 12 and 3 x 4: each worker shows one image" in problem
    assert worker_problems(MultiGrainSpec(batch=batch), 4) == [], "negatives come from the whole step"
    assert worker_problems(MultiGrainSpec(batch=batch, loss={**loss, "weight": 1.0}), 4) == []


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6, 7, 8, 168])
def test_workers_that_share_whole_groups_are_no_problem(workers):
    assert worker_problems(MultiGrainSpec(), workers) == []


@pytest.mark.parametrize(("workers", "advice"), [(5, 510), (16, 480), (400, 1200)])
def test_workers_that_would_break_groups_are_told_the_nearest_size(workers, advice):
    # 504 = 33.6 x 15 = 10.5 x 48 = 0.42 x 1200; a half goes to the even neighbour, and one group each is the least.
    (problem,) = worker_problems(MultiGrainSpec(), workers)
    assert f"got 504 and 3 x 1 x {workers}; set batch.size to {advice}" in problem
    assert worker_problems(MultiGrainSpec(batch={"size": advice}), workers) == []


def test_parts_of_a_step_hold_whole_groups_on_every_worker():
    with pytest.raises(ValidationError, match=r"got 504 and 3 x 5; set batch\.size to 510"):
        MultiGrainSpec(batch={"accumulate": 5})
    # 504 = 3 x 7 x 24: seven parts on 24 workers and on no more.
    spec = MultiGrainSpec(batch={"accumulate": 7})
    assert worker_problems(spec, 24) == []
    (problem,) = worker_problems(spec, 48)
    assert "got 504 and 3 x 7 x 48; set batch.size to 1008" in problem


def test_settings_that_contradict_each_other_are_refused_with_a_way_out():
    with pytest.raises(ValidationError, match=r"p can learn from a finite value only.* set model\.p to 3"):
        MultiGrainSpec(model={"p": math.inf, "learn_p": True})
    with pytest.raises(ValidationError, match=r"adamw diverges .* 0\.2; set it to 0\.001"):
        MultiGrainSpec(optimizer={"algorithm": "adamw"})
    assert MultiGrainSpec(optimizer={"algorithm": "adamw", "rate": 0.05}).optimizer.rate == 0.05
    with pytest.raises(ValidationError, match=r"warmup must be shorter than epochs, got 5\.0 of 5"):
        MultiGrainSpec(epochs=5, optimizer={"warmup": 5.0})


def test_an_unknown_trunk_is_told_with_the_nearest_name():
    for name, near in {"resnet51": "resnet50", "timm/pnasnet5larg": "timm/pnasnet5large"}.items():
        with pytest.raises(ValidationError, match=f"got '{name}'; did you mean '{near}'"):
            MultiGrainSpec(model={"trunk": name})


def test_a_trunk_of_timm_needs_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValidationError, match=r"needs the library.*install"):
        MultiGrainSpec(model={"trunk": "timm/resnet18"})


def test_a_file_of_weights_is_found_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MultiGrainSpec(model={"weights": "w.safetensors"}).model.weights == str(tmp_path / "w.safetensors")
    assert MultiGrainSpec(model={"weights": "zoo"}).model.weights == "zoo"


def test_the_evaluation_size_is_that_of_training_unless_it_is_given():
    assert MultiGrainSpec(image_size=160).evaluation_size == 160
    assert MultiGrainSpec(image_size=160, evaluation={"size": 500}).evaluation_size == 500


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("sizes", [[], [16, 500], (224,)], [[15], [224.0], [True], 224, "224", None]),
        ("exponents", [[], [1, 2.5, 100.0], [math.inf]], [[0.99], [3, 100.1], [math.nan], ["3"], 3.0, None]),
        ("whiten", [True, False], ["yes", 1, None]),
    ],
)
def test_variants_are_a_grid_of_numbers_in_range(key, good, bad):
    for value in good:
        found = getattr(MultiGrainSpec(evaluation={"variants": {key: value}}).evaluation.variants, key)
        assert found == (value if key == "whiten" else tuple(value))
    for value in bad:
        with pytest.raises(ValidationError, match=key):
            MultiGrainSpec(evaluation={"variants": {key: value}})
    with pytest.raises(ValidationError, match="colour"):
        MultiGrainSpec(evaluation={"variants": {"colour": 1}})


def test_a_spec_with_variants_comes_back_from_its_json():
    variants = {"sizes": [32, 48], "exponents": [1, 2.5], "whiten": True}
    spec = MultiGrainSpec(evaluation={"variants": variants})
    for told in (json.dumps(spec.model_dump()), spec.model_dump_json()):
        assert MultiGrainSpec.model_validate(json.loads(told)) == spec

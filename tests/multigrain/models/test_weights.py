import collections
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import wait
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from multigrain.config.training import ModelSettings
from multigrain.models import published
from multigrain.models.multigrain import MultiGrain, build_trunk
from multigrain.models.weights import load_weights, weight_problems

TIMM_TRUNK = "timm/test_resnet"


def classifier(name, seed=1):
    """A whole classifier's state dict, as it is published; running statistics like no fresh network's."""
    torch.manual_seed(seed)
    network = timm.create_model(name[5:]) if name.startswith("timm/") else torchvision.models.get_model(name)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.num_batches_tracked.fill_(7)
    return network.state_dict()


@pytest.fixture(scope="module")
def resnet18():
    return classifier("resnet18")


@pytest.fixture(scope="module")
def small():
    return classifier(TIMM_TRUNK)


def assert_holds(trunk, state, classifier="fc."):
    """Every tensor of the trunk is that of `state`, but for the classifier and for counters it lacks."""
    found = trunk.state_dict()
    assert set(found) >= {key for key in state if not key.startswith(classifier)}
    for key, tensor in found.items():
        assert torch.equal(tensor, state.get(key, torch.tensor(0)).to(tensor.dtype)), key


def fits(trunk, source, **settings):
    found = weight_problems(ModelSettings(trunk=trunk, weights=str(source), **settings))
    assert all(key in ("model.trunk", "model.weights") for key, _ in found)
    return [" ".join(problem) for problem in found]


def refused(trunk, source):
    """The one message of both who look: before the start, and where the weights are loaded."""
    (problem,) = fits(trunk, source)
    network = build_trunk(trunk).module
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"^model\.weights") as error:
        load_weights(network, trunk, str(source))
    assert str(error.value) == problem
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key])
    return problem


def save(state, path):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def test_random_leaves_the_trunk_as_it_is():
    trunk = build_trunk("narrow").module
    before = {key: tensor.clone() for key, tensor in trunk.state_dict().items()}
    load_weights(trunk, "narrow", "random")
    assert all(torch.equal(tensor, before[key]) for key, tensor in trunk.state_dict().items())
    assert fits("narrow", "random") == []


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth.tar"])
def test_a_published_classifier_fills_the_trunk(tmp_path, resnet18, suffix):
    path = save(resnet18, tmp_path / f"weights.{suffix}")
    trunk = build_trunk("resnet18").module
    load_weights(trunk, "resnet18", str(path))
    assert_holds(trunk, resnet18)
    assert fits("resnet18", path) == []


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state, "args": None},
        lambda state: {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}},
        lambda state: {key: tensor.half() for key, tensor in state.items()},
        lambda state: {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")},
        lambda state: {key: tensor for key, tensor in state.items() if not key.startswith("fc.")},
    ],
    ids=["state_dict", "model", "module", "half", "old", "trunk"],
)
def test_the_forms_in_which_networks_are_saved_all_fit(tmp_path, small, wrap):
    saved = wrap(small)
    path = save(saved, tmp_path / "weights.pt")
    trunk = build_trunk(TIMM_TRUNK).module
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model.weights: the prefix 'module.'")
        load_weights(trunk, TIMM_TRUNK, str(path))
        assert fits(TIMM_TRUNK, path) == []
    inner = saved.get("state_dict", saved.get("model", saved))
    assert_holds(trunk, {key.removeprefix("module."): tensor for key, tensor in inner.items()})


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "_orig_mod.", "model.", "module.encoder_q._orig_mod."])
def test_a_common_prefix_is_left_out_and_said(tmp_path, small, prefix):
    state = {prefix + key: tensor for key, tensor in small.items()} | {"projector.0.weight": torch.ones(2)}
    path = save(state, tmp_path / "weights.safetensors")
    trunk = build_trunk(TIMM_TRUNK).module
    with pytest.warns(UserWarning, match=f"the prefix '{prefix}' of the keys in {path} is left out"):
        load_weights(trunk, TIMM_TRUNK, str(path))
    assert_holds(trunk, small)
    with pytest.warns(UserWarning, match=f"the prefix '{prefix}'"):
        assert fits(TIMM_TRUNK, path) == []


def test_a_prefix_whose_rest_does_not_fit_is_named(tmp_path, small):
    state = {f"backbone.{key}": tensor for key, tensor in small.items() if key != "bn1.weight"}
    problem = refused(TIMM_TRUNK, save(state, tmp_path / "weights.pt"))
    assert "without the prefix 'backbone.' bn1.weight is missing; name" in problem


def test_of_two_parts_that_fit_none_is_taken(tmp_path, small):
    state = {f"{part}.{key}": tensor for key, tensor in small.items() for part in ("student", "teacher")}
    problem = refused(TIMM_TRUNK, save(state, tmp_path / "weights.pt"))
    assert "several parts do, with the prefixes 'student.', 'teacher.'; save one" in problem


def test_files_of_the_older_format_of_torch_fit(tmp_path, small):
    torch.save(collections.OrderedDict(small), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    trunk = build_trunk(TIMM_TRUNK).module
    load_weights(trunk, TIMM_TRUNK, str(tmp_path / "old.pth"))
    assert_holds(trunk, small)
    assert fits(TIMM_TRUNK, tmp_path / "old.pth") == []


def test_a_classifier_of_another_name_is_left_aside(tmp_path):
    with torch.device("meta"):
        whole = timm.create_model("vgg11", num_classes=3).state_dict()
    assert {key for key in whole if key.startswith("head.")} == {"head.fc.weight", "head.fc.bias"}
    path = save({key: torch.zeros(1).expand(tensor.shape) for key, tensor in whole.items()}, tmp_path / "weights.pt")
    assert fits("timm/vgg11", path) == []
    del whole["features.0.weight"]
    path = save({key: torch.zeros(1).expand(tensor.shape) for key, tensor in whole.items()}, path)
    assert f"in {path} features.0.weight is missing; " in fits("timm/vgg11", path)[0]


def test_a_checkpoint_of_ours_gives_its_trunk_alone(tmp_path):
    torch.manual_seed(3)
    network = MultiGrain("narrow", num_classes=4, learn_p=True)
    whole = {f"network.{key}": tensor for key, tensor in network.state_dict().items()} | {"margin.beta": torch.ones(())}
    path = save(whole, tmp_path / "model.safetensors")
    trunk = build_trunk("narrow").module
    load_weights(trunk, "narrow", str(path))
    assert_holds(trunk, network.trunk.state_dict())
    assert fits("narrow", path) == []


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_every_key_that_does_not_fit_is_named_at_once(tmp_path, small, suffix):
    state = dict(small)
    del state["conv1.0.weight"], state["bn1.running_var"]
    state["bn1.bias"] = torch.zeros(5)
    state["extra.weight"] = torch.zeros(2)
    problem = refused(TIMM_TRUNK, save(state, tmp_path / f"weights.{suffix}"))
    wanted = tuple(small["bn1.bias"].shape)
    for part in (
        TIMM_TRUNK,
        str(tmp_path),
        "conv1.0.weight is missing",
        "bn1.running_var is missing",
        f"bn1.bias is (5,) instead of {wanted}",
        "extra.weight is unexpected",
    ):
        assert part in problem
    assert "more" not in problem


def test_of_many_keys_twenty_are_named_and_all_are_counted(tmp_path):
    # A convolution has one tensor; a normalisation has five, of which four must be there. `narrow` has 7 of each:
    # one at the start, and in both stages two and a shortcut's.
    path = save({f"{i}.other": torch.zeros(1) for i in range(9)}, tmp_path / "weights.safetensors")
    problem = refused("narrow", path)
    assert problem.count(" is missing") == 20
    assert f", and {7 * 5 - 20 + 9} more; " in problem
    path = save({f"{i}.other": torch.zeros(1) for i in range(20)} | build_trunk("narrow").module.state_dict(), path)
    problem = refused("narrow", path)
    assert problem.count(" is unexpected") == 20
    assert "more" not in problem


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": {}, "args": x}])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_file_is_never_run(tmp_path, wrap, name, new):
    torch.save(wrap(Hostile(str(tmp_path / "canary"))), tmp_path / name, _use_new_zipfile_serialization=new)
    problem = refused("narrow", tmp_path / name)
    assert "save the" in problem
    assert "weights_only" not in problem  # torch's own message advises to trust the file
    assert not (tmp_path / "canary").exists()
    # The file would run it elsewhere.
    if name == "weights.pt":
        torch.load(tmp_path / name, weights_only=False)
        assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_files_that_are_missing_empty_cut_or_of_another_kind_are_refused(tmp_path, small, name):
    path = tmp_path / name
    assert "No such file" in refused("narrow", path)
    whole = save(small, path).read_bytes()
    for content in (b"", b"not weights", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert str(path) in refused(TIMM_TRUNK, path)
    path.unlink()
    path.mkdir()
    assert str(path) in refused("narrow", path)


OTHERS = {
    "page": (b"  <!DOCTYPE html><html>", "is a web page"),
    "error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "is a pointer of Git LFS"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize(("content", "told"), OTHERS.values(), ids=OTHERS.keys())
def test_what_is_often_in_the_place_of_weights_is_told(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name} {told}" in refused("narrow", tmp_path / name)


@pytest.mark.parametrize("new", [True, False])
def test_a_file_that_was_cut_short_is_told(tmp_path, small, new):
    torch.save(small, tmp_path / "weights.pt", _use_new_zipfile_serialization=new)
    whole = (tmp_path / "weights.pt").read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "weights.pt").write_bytes(whole[:size])
        assert "was cut short" in refused(TIMM_TRUNK, tmp_path / "weights.pt")


@pytest.mark.parametrize("new", [True, False])
def test_a_whole_network_is_told_by_its_class(tmp_path, new):
    torch.save(nn.Sequential(nn.Linear(1, 1)), tmp_path / "weights.pt", _use_new_zipfile_serialization=new)
    problem = refused("narrow", tmp_path / "weights.pt")
    assert "holds an object of torch.nn.modules.container.Sequential, such as a whole network; save" in problem


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), {"epoch": 3}, {}, {"state_dict": {"a": 1}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    assert "state dict" in refused("narrow", save(content, tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    ("name", "file"),
    # The weights of the first torchvision, which the paper compares with; the second ones have other files.
    [("resnet18", "resnet18-f37072fd.pth"), ("resnet50", "resnet50-0676ba61.pth")],
)
def test_zoo_takes_the_first_published_weights_of_torchvision(monkeypatch, resnet18, name, file):
    asked = {}

    def download(url, **options):
        asked.update(options, url=url)
        return resnet18

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    trunk = build_trunk("resnet18").module
    if name == "resnet18":
        load_weights(trunk, name, "zoo")
        assert_holds(trunk, resnet18)
    else:
        with pytest.raises(ValueError, match=r"layer1\.0\.conv3\.weight is missing"):
            load_weights(build_trunk(name).module, name, "zoo")
    assert asked["url"] == f"https://download.pytorch.org/models/{file}"
    assert asked["weights_only"]
    assert asked["check_hash"]
    assert fits(name, "zoo") == []


def test_zoo_takes_the_pretrained_weights_of_timm(monkeypatch, small):
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_arguments, **_options: dict(small))
    trunk = build_trunk(TIMM_TRUNK).module
    load_weights(trunk, TIMM_TRUNK, "zoo")
    assert_holds(trunk, small)
    assert fits(TIMM_TRUNK, "zoo") == []


def test_weights_of_timm_that_lack_a_key_are_refused(monkeypatch, small):
    state = {key: tensor for key, tensor in small.items() if key != "bn1.weight"}
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_arguments, **_options: state)
    with pytest.raises(ValueError, match=r"(?s)^model\.weights.*bn1\.weight"):
        load_weights(build_trunk(TIMM_TRUNK).module, TIMM_TRUNK, "zoo")


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("resnet18", "torchvision.models._api.load_state_dict_from_url"),
        (TIMM_TRUNK, "timm.models._builder.load_state_dict_from_hf"),
    ],
)
def test_a_download_that_fails_says_what_to_do(monkeypatch, name, function):
    def fail(*_arguments, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(function, fail)
    with pytest.raises(ValueError, match=rf"^model.weights.*{name}.*no route to host.*name a file"):
        load_weights(build_trunk(name).module, name, "zoo")


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("resnet18", "torchvision.models._api.load_state_dict_from_url"),
        (TIMM_TRUNK, "timm.models._builder.load_state_dict_from_hf"),
    ],
)
def test_a_download_whose_server_is_out_of_reach_is_given_up(monkeypatch, name, function):
    over = threading.Event()
    monkeypatch.setattr(function, lambda *_arguments, **_options: over.wait())
    monkeypatch.setattr(published, "SECONDS", 0.01)
    monkeypatch.setattr(published, "_answers", lambda _: False)
    with pytest.raises(ValueError, match=rf"^model.weights.*{name}.*https://\S+ does not answer.*name a file"):
        load_weights(build_trunk(name).module, name, "zoo")
    monkeypatch.setattr(published, "_answers", lambda _: over.wait())  # no answer at all
    with pytest.raises(ValueError, match=rf"^model.weights.*{name}.*https://\S+ does not answer.*name a file"):
        load_weights(build_trunk(name).module, name, "zoo")
    over.set()


def test_a_slow_download_is_waited_for(monkeypatch, resnet18):
    asked = threading.Event()

    def download(*_arguments, **_options):
        asked.wait()
        return resnet18

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    monkeypatch.setattr(published, "_answers", lambda _: not asked.set())
    trunk = build_trunk("resnet18").module
    monkeypatch.setattr(published, "wait", lambda futures, _: wait(futures, 0))
    load_weights(trunk, "resnet18", "zoo")
    assert_holds(trunk, resnet18)


def test_a_server_that_refuses_the_request_is_in_reach():
    assert not published._answers("http://127.0.0.1:9")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # it knows no method
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert published._answers(f"http://127.0.0.1:{server.server_port}/x")


def test_zoo_is_refused_where_nothing_is_published():
    unpublished = next(name for name in timm.list_models("resnet*") if not timm.is_model_pretrained(name))
    for name in ("narrow", f"timm/{unpublished}"):
        assert name in refused(name, "zoo")


@pytest.mark.parametrize("trunk", ["narrow", "resnet18"])
def test_frozen_statistics_need_weights_that_bring_them(trunk):
    (problem,) = fits(trunk, "random", batchnorm="frozen")
    assert "model.batchnorm" in problem
    assert fits(trunk, "random", batchnorm="sync") == []


def test_all_problems_come_at_once():
    assert len(fits("timm/vit_tiny_patch16_224", "random", batchnorm="frozen")) == 2


def test_a_network_that_gives_no_map_is_a_problem_before_the_start():
    (problem,) = fits("timm/vit_tiny_patch16_224", "random")
    assert problem.startswith("model.trunk must")


def test_random_weights_are_checked_without_torch():
    code = """
import sys
from multigrain.config.training import ModelSettings
from multigrain.models.weights import weight_problems
assert weight_problems(ModelSettings()) == []
assert len(weight_problems(ModelSettings(batchnorm="frozen"))) == 1
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)

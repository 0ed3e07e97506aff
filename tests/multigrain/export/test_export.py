"""Exported models: the same answers in every way of loading, for images of any size; nothing of ours needed."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import SETTINGS, made, save, whitening_of

from multigrain.export import inference, standalone
from multigrain.export.export import export
from multigrain.models import checkpoint
from multigrain.models.multigrain import MultiGrain
from multigrain.models.served_setting import ServedSetting, write

SHAPES = [(1, 32, 32), (3, 33, 47), (2, 96, 160)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A network with a learnt exponent, and its export."""
    folder = tmp_path_factory.mktemp("plain")
    network = MultiGrain("narrow", 3, 2.5, learn_p=True)
    network.load_state_dict(made(4).state_dict(), strict=False)
    with torch.no_grad():
        network.pool.p.add_(1.5)
    save(folder / "run", 1, {**SETTINGS, "model": {"trunk": "narrow", "learn_p": True}}, network=network.eval())
    return network, folder / "run", folder / "model", export(folder / "run", folder / "model")


@pytest.fixture(scope="module")
def whitened(tmp_path_factory):
    """A network that serves p* = 4 at 48 pixels, whitened to 20 dimensions, and its export."""
    folder, network = tmp_path_factory.mktemp("whitened"), made(5)
    save(folder / "run", 1, network=network)
    write(folder / "served", checkpoint.latest(folder / "run"), ServedSetting(48, 4.0, whitening_of(20)))
    return network, folder / "served", folder / "model", export(folder / "served", folder / "model")


def expected(network, images, p, whitening=None):
    """Step by step."""
    with torch.no_grad():
        maps = network.trunk((torch.tensor(images) / 255 - network.mean) / network.std).double()
        pooled = maps.clamp(min=1e-6).pow(p).mean(dim=(2, 3)).pow(1 / p)
        descriptor = pooled / pooled.norm(dim=1, keepdim=True)
        if whitening:
            v = torch.cat([pooled, torch.ones(len(pooled), 1)], dim=1)
            z = (v / v.norm(dim=1, keepdim=True) - whitening.mean) @ whitening.projection
            descriptor = z / z.norm(dim=1, keepdim=True)
        return descriptor.numpy(), network.classifier(pooled.float()).softmax(dim=1).numpy()


@pytest.mark.parametrize("engine", ["torch", "onnx"])
@pytest.mark.parametrize("kind", ["plain", "whitened"])
def test_both_networks_answer_as_the_trained_one_at_any_size(kind, engine, request):
    network, _, folder, _ = request.getfixturevalue(kind)
    settings = {"p": 4.0} | ({"whitening": whitening_of(20)} if kind == "whitened" else {})
    run = standalone.load(folder, engine).run
    rng = np.random.default_rng(0)
    for count, height, width in SHAPES:
        images = rng.integers(0, 256, (count, 3, height, width), dtype=np.uint8)
        for found, right in zip(run(images), expected(network, images, **settings), strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, right, atol=1e-5)


def test_a_network_for_images_of_one_position_answers_for_larger_ones_too(tmp_path):
    network = MultiGrain("resnet18", 3, 3.0).eval()
    save(tmp_path / "run", 1, {"model": {"trunk": "resnet18"}, "image_size": 32}, network=network)
    export(tmp_path / "run", tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 70, 32), dtype=np.uint8)
    answers = standalone.load(tmp_path / "model", "torch").run(images)
    for found, right in zip(answers, expected(network, images, 3.0), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "whitened"])
def test_a_table_of_images_has_the_same_answers_in_every_way_of_loading(kind, request, image_files):
    _, run, folder, _ = request.getfixturevalue(kind)
    images = [*image_files[:3], b"none", *(path.read_bytes() for path in image_files[3:])]
    ways = [inference.load(run), standalone.load(folder, "torch"), standalone.load(folder, "onnx")]
    first, *others = ([*way.answers(images)] for way in ways)
    for answers in others:
        for one, other in zip(first, answers, strict=True):
            assert (one["class_name"], one["error"]) == (other["class_name"], other["error"])
            if one["error"] is None:
                np.testing.assert_allclose(one["embedding"], other["embedding"], atol=1e-5)
                assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_the_facts_are_told_and_written(plain, whitened):
    for (_, _, folder, facts), (size, transform, dimension, white) in (
        (plain, (32, "crop", 128, False)),
        (whitened, (48, "rect", 20, True)),
    ):
        assert json.loads((folder / "model.json").read_text()) == facts
        told = (facts["size"], facts["transform"], facts["dimension"], facts["whitened"])
        assert told == (size, transform, dimension, white)
        assert facts["p"] == pytest.approx(4)
        assert facts["classes"] == ["ant", "bee", "cat"]
        assert set(facts["parity"]) == {"torch", "onnx"}
        assert max(facts["parity"].values()) <= 1e-5


def test_an_infinite_exponent_is_written_as_json_has_it(tmp_path):
    save(tmp_path / "run", 1, network=made(5))
    write(tmp_path / "served", checkpoint.latest(tmp_path / "run"), ServedSetting(32, float("inf"), None))
    assert export(tmp_path / "served", tmp_path / "model")["p"] == "inf"
    json.loads((tmp_path / "model/model.json").read_text(), parse_constant=pytest.fail)


def test_the_checkpoint_in_it_is_the_model_without_its_optimizer(whitened):
    _, run, folder, _ = whitened
    was, now = checkpoint.latest(run), checkpoint.latest(folder / "checkpoint")
    assert (now.state, now.optimizer) == (was.state, {})
    assert all(torch.equal(tensor, was.model[name]) for name, tensor in now.model.items())
    assert inference.read(folder / "checkpoint").facts == inference.read(run).facts
    assert not list(folder.rglob("*.pt"))


def test_it_loads_where_only_numpy_pillow_and_an_engine_are(plain, image_files, tmp_path):
    _, run, folder, _ = plain
    code = textwrap.dedent("""
        import json, runpy, sys
        from pathlib import Path

        class Without:
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, path=None, target=None):
                absent = name.partition(".")[0] in sys.argv[1].split()
                return None if absent else self.finder.find_spec(name, path, target)

        sys.meta_path = [Without(finder) for finder in sys.meta_path]
        load = runpy.run_path(str(Path(sys.argv[2]) / "model.py"))["load"]
        answers = load(Path(sys.argv[2]), sys.argv[3]).answers(Path(name) for name in sys.argv[4:])
        print(json.dumps([answer["embedding"] for answer in answers]))
    """)
    right = [answer["embedding"] for answer in inference.load(run).answers(image_files)]
    for engine, absent in (("torch", "onnxruntime onnx"), ("onnx", "torch")):
        ours = f"{absent} multigrain grainmill torchvision timm pandas mlflow ray safetensors"
        command = [sys.executable, "-c", code, ours, str(folder), engine, *map(str, image_files)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(json.loads(done.stdout), right, atol=1e-5)


def test_an_export_that_answers_differently_is_not_given_away(tmp_path, monkeypatch):
    save(tmp_path / "run", 1, network=made(5))
    onnx = standalone._onnx
    monkeypatch.setattr(standalone, "_onnx", lambda file: lambda images: [x + 2e-5 for x in onnx(file)(images)])
    with pytest.raises(ValueError, match=r"to 1e-05, but onnx by 2.*report the trunk, narrow"):
        export(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model" / "MANIFEST.json").exists()


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx", "model.py", "model.json", "signature.json"])
def test_every_file_is_sealed(plain, name):
    file = Path(plain[2]) / name
    whole = file.read_bytes()
    try:
        for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name} was changed"):
                standalone.load(plain[2])
    finally:
        file.write_bytes(whole)
    standalone.check(plain[2])

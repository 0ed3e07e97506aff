"""Training state on disk: the same bits back, or, where that cannot be, the checkpoint before and a warning."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from multigrain import checkpoint
from multigrain.checkpoint import Checkpoint

FILES = ["MANIFEST.json", "model.safetensors", "optimizer.pt", "state.json"]


def trained(epoch):
    """A small network, its optimizer after a step, and the state of an epoch."""
    torch.manual_seed(epoch)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.BatchNorm2d(3))
    network = network.to(memory_format=torch.channels_last)
    groups = [{"params": network[0].parameters(), "lr": 0.1 + 0.2}, {"params": network[1].parameters(), "lr": 1e-300}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    network(torch.randn(4, 2, 4, 4)).square().sum().backward()
    optimizer.step()
    state = {"epoch": epoch, "metrics": {"loss": 0.1 + 0.2}, "spec": {"p": 3.0}, "classes": ["ä", "b"]}
    return Checkpoint(network.state_dict(), optimizer.state_dict(), state)


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def seal(directory):
    """Write the manifest that belongs to the files of a checkpoint as they are now."""
    manifest = {}
    for name in FILES[1:]:
        content = (directory / name).read_bytes()
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / "MANIFEST.json").write_text(json.dumps(manifest))


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    special = trained(3)
    special.model["numbers"] = torch.tensor([float("nan"), float("-inf"), -0.0, 5e-324], dtype=torch.float64)
    special.model["half"] = torch.randn(3).to(torch.bfloat16)
    special.model["empty"] = torch.zeros(0, 3)
    directory = checkpoint.save(tmp_path / "deep" / "folder", special)
    assert names(directory) == FILES
    for loaded in (checkpoint.latest(tmp_path / "deep" / "folder"), checkpoint.read(directory)):
        bits = [model.pop("numbers").view(torch.int64) for model in (loaded.model, dict(special.model))]
        assert torch.equal(*bits)
        special_model = {name: tensor for name, tensor in special.model.items() if name != "numbers"}
        assert_same(loaded.model, special_model)
        assert_same(loaded.optimizer, special.optimizer)
        assert loaded.state == special.state


def test_a_loaded_optimizer_steps_as_the_saved_one_would(tmp_path):
    made = trained(1)
    checkpoint.save(tmp_path, made)
    loaded = checkpoint.latest(tmp_path)
    steps = []
    for source in (made, loaded):
        network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.BatchNorm2d(3))
        network.load_state_dict(source.model)
        groups = [{"params": network[0].parameters()}, {"params": network[1].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        optimizer.load_state_dict(source.optimizer)
        network(torch.ones(4, 2, 4, 4)).sum().backward()
        optimizer.step()
        steps.append(network.state_dict())
    assert_same(*steps)


def test_nothing_is_found_where_nothing_was_saved(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


def test_the_newest_two_are_kept(tmp_path):
    for epoch in (1, 2, 3, 9998, 9999, 10000):
        assert checkpoint.save(tmp_path, trained(epoch)).is_dir()
        assert checkpoint.latest(tmp_path).state["epoch"] == epoch
    assert names(tmp_path) == ["epoch-10000", "epoch-9999"]


def test_an_epoch_saved_again_replaces_the_first(tmp_path):
    checkpoint.save(tmp_path, trained(1))
    again = trained(2)
    again.state["epoch"] = 1
    checkpoint.save(tmp_path, again)
    assert_same(checkpoint.latest(tmp_path).model, again.model)
    assert names(tmp_path) == ["epoch-0001"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_last(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, flip_last, truncate, empty, os.unlink])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, name, damage):
    older = trained(1)
    checkpoint.save(tmp_path, older)
    damaged = checkpoint.save(tmp_path, trained(2))
    damage(damaged / name)
    with pytest.warns(UserWarning, match="epoch-0002") as warned:
        found = checkpoint.latest(tmp_path)
    assert len(warned) == 1
    assert found.state == older.state
    assert_same(found.model, older.model)
    with pytest.raises(ValueError, match="epoch-0002"):
        checkpoint.read(damaged)


@pytest.mark.parametrize("content", ["[]", "{}", '{"state.json": null}'])
def test_a_manifest_that_covers_not_all_files_is_passed_over(tmp_path, content):
    checkpoint.save(tmp_path, trained(1))
    (checkpoint.save(tmp_path, trained(2)) / "MANIFEST.json").write_text(content)
    with pytest.warns(UserWarning, match="epoch-0002"):
        assert checkpoint.latest(tmp_path).state["epoch"] == 1


def test_the_manifest_covers_every_file(tmp_path):
    directory = checkpoint.save(tmp_path, trained(1))
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    assert sorted(manifest) == FILES[1:]
    for name, entry in manifest.items():
        assert entry["bytes"] == (directory / name).stat().st_size
        assert entry["sha256"] == hashlib.sha256((directory / name).read_bytes()).hexdigest()


def test_every_damaged_checkpoint_is_named(tmp_path):
    for epoch in (1, 2):
        flip(checkpoint.save(tmp_path, trained(epoch)) / "state.json")
    with pytest.warns(UserWarning, match="state.json") as warned:
        assert checkpoint.latest(tmp_path) is None
    assert ["epoch-0002" in str(warned[0].message), "epoch-0001" in str(warned[1].message)] == [True, True]
    assert len(warned) == 2


def test_another_format_is_refused(tmp_path):
    directory = checkpoint.save(tmp_path, trained(1))
    state = json.loads((directory / "state.json").read_text())
    (directory / "state.json").write_text(json.dumps({**state, "format": 2}))
    seal(directory)
    with pytest.raises(ValueError, match="format 1"):
        checkpoint.read(directory)


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def zip_pickle(payload, path):
    torch.save({"state": payload, "param_groups": []}, path)


def bare_pickle(payload, path):
    path.write_bytes(pickle.dumps(payload, protocol=2))


def trusting_load(path):
    return torch.load(path, weights_only=False)


def trusting_unpickle(path):
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize(("write", "trust"), [(zip_pickle, trusting_load), (bare_pickle, trusting_unpickle)])
def test_no_code_in_a_checkpoint_is_run(tmp_path, write, trust):
    write(Hostile(tmp_path / "bait"), tmp_path / "trap.pt")
    trust(tmp_path / "trap.pt")
    assert (tmp_path / "bait").exists(), "the trap must work on a reader that trusts it"
    directory = checkpoint.save(tmp_path / "run", trained(1))
    write(Hostile(tmp_path / "canary"), directory / "optimizer.pt")
    seal(directory)
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        checkpoint.read(directory)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "step",
    [
        "multigrain.checkpoint.save_file",
        "multigrain.checkpoint.torch.save",
        "multigrain.checkpoint._digest",
        "multigrain.checkpoint._sync",
        "pathlib.Path.rename",
    ],
)
def test_an_interrupted_save_leaves_the_one_before_the_newest(tmp_path, monkeypatch, step):
    older = trained(1)
    checkpoint.save(tmp_path, older)
    with monkeypatch.context() as patch:
        patch.setattr(step, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, trained(2))
    assert_same(checkpoint.latest(tmp_path).model, older.model)
    newer = trained(2)
    checkpoint.save(tmp_path, newer)
    assert_same(checkpoint.latest(tmp_path).model, newer.model)
    assert names(tmp_path) == ["epoch-0001", "epoch-0002"]


def test_a_checkpoint_is_complete_from_the_moment_it_has_its_name(tmp_path, monkeypatch):
    rename = Path.rename
    seen = []

    def watched(draft, target):
        seen.append((names(draft), names(tmp_path)))
        return rename(draft, target)

    monkeypatch.setattr(Path, "rename", watched)
    checkpoint.save(tmp_path, trained(1))
    assert seen == [(FILES, ["draft-epoch-0001"])]


def test_junk_beside_checkpoints_is_no_checkpoint(tmp_path):
    directory = checkpoint.save(tmp_path, trained(1))
    shutil.copytree(directory, tmp_path / "draft-epoch-0009")
    shutil.copytree(directory, tmp_path / "epoch-0007.copy2")
    (tmp_path / "notes.txt").write_text("epoch-0008")
    assert checkpoint.latest(tmp_path).state["epoch"] == 1

"""Training state on disk: the same bits back, or, where that cannot be, the checkpoint before and a warning."""

import errno
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import threading
from contextlib import closing, contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from networks import FILES, assert_same
from safetensors import SafetensorError

from multigrain.models import checkpoint
from multigrain.models.checkpoint import Checkpoint, Writer


def trained(steps):
    """A small network, its optimizer after a step, and the state of a run."""
    torch.manual_seed(steps)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.BatchNorm2d(3))
    network = network.to(memory_format=torch.channels_last)
    groups = [{"params": network[0].parameters(), "lr": 0.1 + 0.2}, {"params": network[1].parameters(), "lr": 1e-300}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    network(torch.randn(4, 2, 4, 4)).square().sum().backward()
    optimizer.step()
    state = {"steps": steps, "totals": {"loss": 0.1 + 0.2}, "spec": {"p": 3.0}, "classes": ["ä", "b"]}
    return Checkpoint(network.state_dict(), optimizer.state_dict(), state)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def seal(directory, files=FILES[1:]):
    """Write the manifest that belongs to the files of a checkpoint as they are now."""
    manifest = {}
    for name in files:
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
    for steps in (1, 2, 3, 99999998, 99999999, 100000000):
        assert checkpoint.save(tmp_path, trained(steps)).is_dir()
        assert checkpoint.latest(tmp_path).state["steps"] == steps
    assert names(tmp_path) == ["step-100000000", "step-99999999"]


def test_what_was_just_saved_is_kept_beside_damaged_ones_of_more_steps(tmp_path):
    for steps in (200, 300):
        (checkpoint.save(tmp_path, trained(steps)) / "state.json").unlink()
    for steps in (100, 200, 300):
        assert checkpoint.save(tmp_path, trained(steps)).is_dir()
        assert checkpoint.read(tmp_path / f"step-{steps:08d}").state["steps"] == steps
    assert names(tmp_path) == ["step-00000200", "step-00000300"]
    assert checkpoint.latest(tmp_path).state["steps"] == 300


def test_a_step_saved_again_replaces_the_first(tmp_path):
    checkpoint.save(tmp_path, trained(1))
    again = trained(2)
    again.state["steps"] = 1
    checkpoint.save(tmp_path, again)
    assert_same(checkpoint.latest(tmp_path).model, again.model)
    assert names(tmp_path) == ["step-00000001"]


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
    with pytest.warns(UserWarning, match="step-00000002") as warned:
        found = checkpoint.latest(tmp_path)
    assert len(warned) == 1
    assert found.state == older.state
    assert_same(found.model, older.model)
    with pytest.raises(ValueError, match="step-00000002.*" + name.replace(".", r"\.")):
        checkpoint.read(damaged)


@pytest.mark.parametrize("content", ["[]", "{}", '{"state.json": null}', "null", "1"])
def test_a_manifest_that_covers_not_all_files_is_passed_over(tmp_path, content):
    checkpoint.save(tmp_path, trained(1))
    (checkpoint.save(tmp_path, trained(2)) / "MANIFEST.json").write_text(content)
    with pytest.warns(UserWarning, match="step-00000002 MANIFEST.json does not list"):
        assert checkpoint.latest(tmp_path).state["steps"] == 1


def test_a_manifest_that_covers_another_file_is_passed_over(tmp_path):
    checkpoint.save(tmp_path, trained(1))
    directory = checkpoint.save(tmp_path, trained(2))
    (directory / "notes.txt").write_text("intact")
    seal(directory, [*FILES[1:], "notes.txt"])
    with pytest.warns(UserWarning, match="step-00000002 MANIFEST.json does not list"):
        assert checkpoint.latest(tmp_path).state["steps"] == 1


def test_the_manifest_covers_every_file(tmp_path):
    directory = checkpoint.save(tmp_path, trained(1))
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    assert sorted(manifest) == FILES[1:]
    for name, entry in manifest.items():
        assert entry["bytes"] == (directory / name).stat().st_size
        assert entry["sha256"] == hashlib.sha256((directory / name).read_bytes()).hexdigest()


def test_every_damaged_checkpoint_is_named(tmp_path):
    for steps in (1, 2):
        flip(checkpoint.save(tmp_path, trained(steps)) / "state.json")
    with pytest.warns(UserWarning, match="state.json") as warned:
        assert checkpoint.latest(tmp_path) is None
    assert ["step-00000002" in str(warned[0].message), "step-00000001" in str(warned[1].message)] == [True, True]
    assert len(warned) == 2


@pytest.mark.parametrize("other", [{"format": 1}, {"format": 3}, {}])
def test_another_format_is_passed_over(tmp_path, other):
    checkpoint.save(tmp_path, trained(1))
    directory = checkpoint.save(tmp_path, trained(2))
    state = json.loads((directory / "state.json").read_text())
    assert state.pop("format") == 2
    (directory / "state.json").write_text(json.dumps(state | other))
    seal(directory)
    with pytest.raises(ValueError, match=r"format 2, but .*step-00000002"):
        checkpoint.read(directory)
    with pytest.warns(UserWarning, match=r"format 2, but .*step-00000002"):
        assert checkpoint.latest(tmp_path).state["steps"] == 1


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
    for read, place in [(checkpoint.read, directory), (checkpoint.latest, tmp_path / "run")]:
        with pytest.raises(pickle.UnpicklingError):
            read(place)
    assert not (tmp_path / "canary").exists()


def half(path):
    path.write_bytes(b"half of it")


def broken_save_file(tensors, path):
    half(path)
    raise OSError(errno.ENOSPC, "No space left on device")


def broken_torch_save(state, path):
    half(path)
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("step", "broken"),
    [
        ("multigrain.models.checkpoint.save_file", broken_save_file),
        ("multigrain.models.checkpoint.torch.save", broken_torch_save),
        ("pathlib.Path.write_text", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))),
        ("multigrain.models.checkpoint.digest", Mock(side_effect=KeyboardInterrupt)),
        ("multigrain.models.checkpoint.os.fsync", Mock(side_effect=OSError(errno.EIO, "Input/output error"))),
        ("pathlib.Path.rename", Mock(side_effect=KeyboardInterrupt)),
    ],
)
def test_an_interrupted_save_leaves_the_one_before_the_newest_and_no_debris(tmp_path, monkeypatch, step, broken):
    older = trained(1)
    checkpoint.save(tmp_path, older)
    with monkeypatch.context() as patch:
        patch.setattr(step, broken)
        with pytest.raises((OSError, KeyboardInterrupt)):
            checkpoint.save(tmp_path, trained(2))
    assert names(tmp_path) == ["step-00000001"]
    assert_same(checkpoint.latest(tmp_path).model, older.model)
    newer = trained(2)
    checkpoint.save(tmp_path, newer)
    assert_same(checkpoint.latest(tmp_path).model, newer.model)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@contextmanager
def largest_file(size):
    """Files may not grow beyond so many bytes: a full disk, as the operating system tells it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "name"), [(64, "model.safetensors"), (2000, "optimizer.pt"), (40000, "state.json")])
def test_a_full_disk_leaves_the_one_before_the_newest_and_no_debris(tmp_path, size, name):
    older, newer = trained(1), trained(2)
    newer.state["classes"] = ["x" * 100] * 500
    sizes = {path.name: path.stat().st_size for path in checkpoint.save(tmp_path / "free", newer).iterdir()}
    assert next(file for file in FILES[1:] if sizes[file] > size) == name, "the files before fit"
    checkpoint.save(tmp_path, older)
    with pytest.raises((OSError, RuntimeError, SafetensorError)), largest_file(size):
        checkpoint.save(tmp_path, newer)
    shutil.rmtree(tmp_path / "free")
    assert names(tmp_path) == ["step-00000001"]
    assert_same(checkpoint.latest(tmp_path).model, older.model)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # torch still holds the file that it could not write


@pytest.mark.parametrize("floats", [400_000, 200_000], ids=["model", "optimizer"])
def test_a_disk_without_room_is_told_with_what_is_needed_and_the_one_before_stays(small_disk, floats):
    older, newer = trained(1), trained(2)
    checkpoint.save(small_disk, older)
    newer.model["large"] = torch.zeros(floats)
    newer.optimizer["state"][0]["large"] = torch.zeros(floats)
    with closing(Writer(small_disk)) as writer:
        writer.save(newer)
        with pytest.raises(
            OSError, match=rf"must fit into {small_disk}, but after [\d,]+ there are [\d,]+ free; make"
        ) as caught:
            writer.wait()
    assert caught.value.errno == errno.ENOSPC
    assert int(re.search(r"of ([\d,]+) bytes", str(caught.value))[1].replace(",", "")) >= 8 * floats
    assert names(small_disk) == ["step-00000001"]
    assert_same(checkpoint.latest(small_disk).model, older.model)
    checkpoint.save(small_disk, trained(3))


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    draft = tmp_path / "draft-step-00000001"
    draft.mkdir()
    half(draft / "model.safetensors")
    half(draft / "junk")
    checkpoint.save(tmp_path, trained(1))
    assert names(tmp_path) == ["step-00000001"]
    assert names(tmp_path / "step-00000001") == FILES


def test_a_checkpoint_is_complete_and_on_disk_from_the_moment_it_has_its_name(tmp_path, monkeypatch):
    rename, fsync, seen = Path.rename, os.fsync, []

    def watched_rename(draft, target):
        seen.append((names(draft), names(tmp_path)))
        return rename(draft, target)

    def watched_fsync(handle):
        seen.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    monkeypatch.setattr(Path, "rename", watched_rename)
    monkeypatch.setattr(checkpoint.os, "fsync", watched_fsync)
    directory = checkpoint.save(tmp_path, trained(1))
    place = seen.index((FILES, ["draft-step-00000001"]))
    number = {path.name: (path.stat().st_ino, path.stat().st_size) for path in (*directory.iterdir(), directory)}
    assert sorted(seen[:place]) == sorted(number.values())
    # The new name itself, last.
    assert [inode for inode, _ in seen[place + 1 :]] == [tmp_path.stat().st_ino]


def test_junk_beside_checkpoints_is_no_checkpoint(tmp_path):
    directory = checkpoint.save(tmp_path, trained(1))
    shutil.copytree(directory, tmp_path / "draft-step-00000009")
    shutil.copytree(directory, tmp_path / "step-00000007.copy2")
    shutil.copytree(directory, tmp_path / "epoch-0007")
    (tmp_path / "notes.txt").write_text("step-00000008")
    assert checkpoint.latest(tmp_path).state["steps"] == 1


def writing_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_what_is_written_is_what_was_handed_over(tmp_path, monkeypatch):
    gate, save_file = threading.Event(), checkpoint.save_file

    def gated(*arguments):
        assert gate.wait(60)
        save_file(*arguments)

    monkeypatch.setattr("multigrain.models.checkpoint.save_file", gated)
    made, expected = trained(1), trained(1)
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    made.model["weight"], expected.model["weight"] = weight, torch.tensor([1.0, 2.0])
    with closing(Writer(tmp_path)) as writer:
        writer.save(made)  # returns while nothing is written
        assert checkpoint.latest(tmp_path) is None
        with torch.no_grad():
            for tensor in made.model.values():
                tensor.add_(1)
            for entry in made.optimizer["state"].values():
                entry["momentum_buffer"].zero_()
        made.optimizer["param_groups"][0]["lr"] = 7.0
        made.state["totals"]["loss"] = 7.0
        gate.set()
        writer.wait()
        found = checkpoint.latest(tmp_path)
    for one, other in zip(found, expected, strict=True):
        assert_same(dict(one), dict(other))


def test_a_writer_waits_for_the_last_write_before_it_takes_another_copy(tmp_path, monkeypatch):
    events, flatten = [], checkpoint.pytree.tree_flatten

    class Watched(Writer):
        def wait(self):
            super().wait()
            events.append("waited")

    def watched_flatten(tree):
        events.append("copied")  # the copies are made of what this gives
        return flatten(tree)

    monkeypatch.setattr(checkpoint.pytree, "tree_flatten", watched_flatten)
    monkeypatch.setattr(checkpoint, "save", lambda *_: events.append("written"))
    with closing(Watched(tmp_path)) as writer:
        for steps in (1, 2, 3):
            writer.save(trained(steps))
    # The first save has nothing to wait for, but asks.
    assert events == ["waited", "copied", "written"] * 3 + ["waited"]


def test_a_writer_copies_into_the_memory_of_its_last_copy_where_it_fits(tmp_path):
    def saved(model):
        writer.save(Checkpoint(model, {}, {"steps": len(places) + 1}))
        writer.wait()
        places.append([value.data_ptr() for value in writer._copies if isinstance(value, torch.Tensor)])
        return checkpoint.latest(tmp_path).model

    places = []
    with closing(Writer(tmp_path)) as writer:
        saved({"a": torch.zeros(3), "b": torch.zeros(2, 2)})
        second = {"a": torch.tensor([1.0, 2, 3]), "b": torch.full((2, 2), 5.0)}
        found = saved(second)
        assert places[0] == places[1]
        assert all(torch.equal(found[name], tensor) for name, tensor in second.items())
        # Of another size, of another type, and one more: the old memory does not fit.
        third = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.float64), "c": torch.ones(1)}
        found = saved(third)
    assert all(torch.equal(found[name], tensor) for name, tensor in third.items())
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in third.items()}


def test_a_writer_keeps_the_newest_two(tmp_path):
    with closing(Writer(tmp_path)) as writer:
        for steps in (1, 2, 3):
            writer.save(trained(steps))
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert_same(checkpoint.latest(tmp_path).model, trained(3).model)


def test_a_failed_write_is_told_once_by_what_comes_next(tmp_path, monkeypatch):
    with closing(Writer(tmp_path)) as writer:
        for tell in (writer.wait, lambda: writer.save(trained(2))):
            with monkeypatch.context() as patch:
                patch.setattr("multigrain.models.checkpoint.save_file", broken_save_file)
                writer.save(trained(1))
                with pytest.raises(OSError, match="No space left"):
                    tell()
            writer.wait()
            assert names(tmp_path) == []
        writer.save(trained(3))
        writer.wait()
        assert names(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("fails", [False, True])
def test_close_waits_tells_of_a_failure_and_ends_the_thread(tmp_path, monkeypatch, fails):
    writer = Writer(tmp_path)
    if fails:
        monkeypatch.setattr("multigrain.models.checkpoint.save_file", broken_save_file)
    writer.save(trained(1))
    assert len(writing_threads()) == 1
    if fails:
        with pytest.raises(OSError, match="No space left"):
            writer.close()
    else:
        writer.close()
    assert names(tmp_path) == [] if fails else ["step-00000001"]
    assert writing_threads() == []

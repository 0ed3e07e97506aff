import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grainmill.config.experiment import load
from grainmill.config.yaml_document import to_yaml
from grainmill.errors import BusyError, NameTakenError, StorageError
from grainmill.workflows import run_folder

TEXT = "name: small\ndata: {builtin: shapes}\nobjective: {top1: max}\nbase: {epochs: 3}\n"


@pytest.fixture
def read(tmp_path):
    """An experiment whose storage is `tmp_path / "storage"`, with overrides."""
    file = tmp_path / "file.yaml"
    file.write_text(TEXT)

    def read(*overrides):
        return load(file, [f"storage={tmp_path / 'storage'}", *overrides])

    return read


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def begin(experiment, kind="run", *, finished=False):
    """The name of the folder that a run gets; the run is cut short unless finished."""
    with run_folder.claim(experiment, kind, print) as (folder, place, keep):
        assert folder.is_dir()
        assert place == str(folder)
        keep()
        assert folder.parent == Path(experiment.storage) / experiment.name
        if finished:
            run_folder.finish(folder, {})
    return folder.name


def test_the_same_settings_carry_on_a_run_that_was_cut_short(read):
    assert [begin(read()) for _ in range(3)] == ["run-1", "run-1", "run-1"]


def test_storage_among_the_files_of_a_job_is_refused(read, tmp_path):
    inside = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_1/grainmill-runs"
    with pytest.raises(StorageError, match=rf"must outlive the job, but {inside}/small is among the"):
        begin(read(f"storage={inside}"))
    assert not inside.exists()


def test_a_finished_run_is_followed_by_the_next_number(read):
    experiment = read()
    # Beyond 9, so that run-10 is not taken to stand before run-9.
    assert [begin(experiment, finished=True) for _ in range(11)] == [f"run-{number}" for number in range(1, 12)]
    assert [begin(experiment) for _ in range(2)] == ["run-12", "run-12"]


def test_a_run_that_failed_is_carried_on(read):
    with pytest.raises(ZeroDivisionError), run_folder.claim(read(), "run", print):
        raise ZeroDivisionError
    assert begin(read()) == "run-1"


def test_searches_and_single_trainings_are_numbered_separately(read):
    steps = [("run", True), ("train", False), ("run", True), ("train", True), ("train", True), ("run", False)]
    found = [begin(read(), kind, finished=finished) for kind, finished in steps]
    assert found == ["run-1", "train-1", "run-2", "train-1", "train-2", "run-3"]


def test_folders_that_people_put_beside_the_runs_are_left_alone(read):
    begin(read(), finished=True)
    home = Path(read().storage) / "small"
    for name in ["run-1-copy", "run-7.old", "run-x", "running", "7"]:
        (home / name).mkdir()
    assert begin(read()) == "run-2"


def test_the_record_is_the_experiment_file(read, tmp_path):
    before = read("tracking.uri=http://127.0.0.1:5000")
    begin(before)
    record = tmp_path / "storage" / "small" / "experiment.yaml"
    assert record.read_text().startswith(to_yaml(before.identity()))
    with run_folder.recorded("small", str(tmp_path / "storage")) as found:
        assert found == record
    assert load(record).model_dump() == before.model_dump()


def test_a_name_that_was_not_used_cannot_be_carried_on(read, tmp_path):
    begin(read())
    with pytest.raises(StorageError, match="'smal' has not; known: small; name one that"):
        run_folder.recorded("smal", str(tmp_path / "storage")).__enter__()
    with pytest.raises(StorageError, match="known: none"):
        run_folder.recorded("small", str(tmp_path / "elsewhere")).__enter__()


def test_checkpoints_of_a_finished_run_are_those_of_its_model(tmp_path):
    assert run_folder.checkpoints(str(tmp_path)) is None
    run_folder.finish(tmp_path, {"checkpoints": "trials/final-0001"})
    assert run_folder.checkpoints(str(tmp_path)) == f"{tmp_path}/trials/final-0001"
    for elsewhere in ("../other", "/tmp/other", ""):
        run_folder.finish(tmp_path, {"checkpoints": elsewhere})
        with pytest.raises(StorageError, match=rf"plain path .* got '{elsewhere}' in {tmp_path}/done\.json"):
            run_folder.checkpoints(str(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "before", "now"),
    [
        (["base.epochs=4"], ["epochs: 3"], ["epochs: 4"]),
        (["search.trials=7", "base.seed=1"], ["seed: 0", "trials: 20"], ["seed: 1", "trials: 7"]),
        (["space={model.p: {choice: [1.0]}}"], ["space: {}"], ["space:", "model.p:", "choice:", "- 1.0"]),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_with_what_differs_and_nothing_is_written(
    read, tmp_path, overrides, before, now, finished
):
    begin(read(), finished=finished)
    files = tree(tmp_path)
    for refuse in (lambda: run_folder.check_name(read(*overrides)), lambda: begin(read(*overrides))):
        with pytest.raises(NameTakenError) as caught:
            refuse()
        head, *lines = str(caught.value).splitlines()
        assert [
            part for part in ["'small'", str(tmp_path / "storage" / "small"), "--set name="] if part not in head
        ] == []
        assert [line[1:].strip() for line in lines if line.startswith("-")] == before
        assert [line[1:].strip() for line in lines if line.startswith("+")] == now
        assert tree(tmp_path) == files
    # And the name still stands for the first settings.
    assert begin(read()) == ("run-2" if finished else "run-1")


def test_a_free_name_and_the_same_settings_pass_and_nothing_is_written(read, tmp_path):
    files = tree(tmp_path)
    run_folder.check_name(read())
    assert tree(tmp_path) == files
    begin(read())
    files = tree(tmp_path)
    run_folder.check_name(read())
    assert tree(tmp_path) == files


def test_settings_that_another_process_recorded_meanwhile_are_seen_under_the_lock(read, monkeypatch):
    record = Path(read().storage) / "small" / "experiment.yaml"
    lock = run_folder.fcntl.flock

    def slow_lock(*arguments):
        # Between the look at the record and the lock, another process came, went, and left its settings.
        record.write_text(to_yaml(read("base.epochs=4").identity()))
        lock(*arguments)

    monkeypatch.setattr(run_folder.fcntl, "flock", slow_lock)
    with pytest.raises(NameTakenError, match="epochs: 4"):
        begin(read())
    assert record.read_text() == to_yaml(read("base.epochs=4").identity())


def test_names_do_not_meet(read):
    assert begin(read(), finished=True) == "run-1"
    assert begin(read("name=other", "base.epochs=4")) == "run-1"
    assert begin(read()) == "run-2"


def test_the_storage_folder_may_move_and_the_tracking_server_may_change(read, tmp_path):
    begin(read())
    shutil.move(tmp_path / "storage", tmp_path / "moved")
    moved = read(f"storage={tmp_path / 'moved'}", "tracking.uri=http://elsewhere", "tracking.model=other")
    assert begin(moved, finished=True) == "run-1"
    assert begin(moved) == "run-2"
    assert not (tmp_path / "storage").exists()


def test_a_relative_storage_folder_lies_in_the_working_directory(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with run_folder.claim(read("storage=here"), "run", print) as (folder, _, _):
        assert folder == tmp_path / "here" / "small" / "run-1"


def test_one_process_gets_a_name_only_once_at_a_time(read):
    with run_folder.claim(read(), "run", print), pytest.raises(BusyError):
        begin(read(), "train")
    assert begin(read(), "train") == "train-1"


HOLDER = """
import sys
from pathlib import Path
from grainmill.workflows import run_folder
from grainmill.config.experiment import load

with run_folder.claim(load(Path(sys.argv[1]), sys.argv[2:]), "run", print) as (folder, _, _):
    print(folder.name, flush=True)
    sys.stdin.read()  # until the other end of the pipe is closed
"""


def test_a_second_process_is_refused_until_the_first_ends_or_is_killed(read, tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "file.yaml"), f"storage={tmp_path / 'storage'}"]

    def hold():
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with hold() as first:
        assert first.stdout.readline() == "run-1\n"
        files = tree(tmp_path)
        for kind in ("run", "train"):
            with pytest.raises(BusyError) as caught:
                begin(read(), kind)
            parts = ["one process at a time", "'small'", str(tmp_path / "storage" / "small"), "wait"]
            assert [part for part in parts if part not in str(caught.value)] == []
        assert tree(tmp_path) == files
        assert begin(read("name=other")) == "run-1"
        os.kill(first.pid, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    assert begin(read()) == "run-1"

    with hold() as second:
        assert second.stdout.readline() == "run-1\n"
        with pytest.raises(BusyError):
            begin(read())
        second.stdin.close()
        assert second.wait() == 0
    assert begin(read()) == "run-1"


def test_a_finished_run_holds_its_outcome(read):
    with run_folder.claim(read(), "run", print) as (folder, _, _):
        run_folder.finish(folder, {"version": "models:/small/1", "metrics": {"top1": 0.5}})
    outcome = json.loads((folder / "done.json").read_text())
    assert outcome == {"version": "models:/small/1", "metrics": {"top1": 0.5}}
    assert [path.name for path in folder.iterdir()] == ["done.json"]


def test_a_run_that_is_cut_short_while_it_is_finished_is_carried_on(read, monkeypatch):
    def cut_short(path, text, **_):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with run_folder.claim(read(), "run", print) as (folder, _, _), monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", cut_short)
        with pytest.raises(KeyboardInterrupt):
            run_folder.finish(folder, {"version": "models:/small/1"})
    assert begin(read(), finished=True) == "run-1"
    assert begin(read()) == "run-2"


def test_a_process_that_is_cut_short_while_it_records_the_settings_does_not_spoil_the_name(read, monkeypatch):
    def cut_short(path, text, **_):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", cut_short)
        with pytest.raises(KeyboardInterrupt):
            begin(read())
    assert begin(read()) == "run-1"

"""Runs whose storage is in S3: whose name, who writes, what is carried on, and what is read of them."""

import pytest
import toy
from s3_servers import seen_by_another

from grainmill.config.experiment import experiment_model
from grainmill.errors import BusyError, NameTakenError, StorageError
from grainmill.execution.training_job import TrainingJob, epochs
from grainmill.storage import lock, workspace
from grainmill.storage.mirror import S3Files
from grainmill.trainable import no_progress
from grainmill.workflows import evaluate, run_folder, tune


@pytest.fixture
def storage(place):
    return place.removesuffix("/trial-0001")


def experiment(storage, **changes):
    content = {"name": "far", "trainable": "toy", "data": {}, "objective": {"score": "max"}, "storage": storage}
    return experiment_model(toy).model_validate({**content, **changes})


def begin(checked, kind="run", *, finished=False):
    with run_folder.claim(checked, kind, print) as (folder, where, keep):
        assert where == f"{checked.storage}/far/{folder.name}"
        (folder / "parent-run").write_text("x")
        if finished:
            run_folder.finish(folder, {"checkpoints": "trials/final-0000"})
        keep()
    return folder.name


def test_runs_are_numbered_and_carried_on_by_any_machine(storage):
    checked = experiment(storage)
    assert [begin(checked, finished=done) for done in (False, False, True, True, False)] == [
        *("run-1", "run-1", "run-1", "run-2", "run-3")
    ]
    assert begin(checked, "train") == "train-1"
    found = seen_by_another(f"{storage}/far")
    assert found.keys() == {
        *("experiment.yaml", "run-1/parent-run", "run-1/done.json", "run-2/parent-run", "run-2/done.json"),
        *("run-3/parent-run", "train-1/parent-run"),
    }


def test_what_trials_and_ray_keep_below_a_name_is_left_alone(storage, bucket):
    theirs = {f"runs/far/run-1/{name}": b"x" for name in ("trials/trial-0000/.index.json", "ray/trial/state.json")}
    bucket.put(**theirs, **{"runs/far/data/digits/0.png": b"x"})
    begin(experiment(storage), finished=True)
    assert theirs.keys() | {"runs/far/data/digits/0.png"} <= {one["Key"] for one in bucket.objects()}


def test_other_settings_and_other_processes_are_refused(storage, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    with run_folder.claim(experiment(storage), "run", print):
        with pytest.raises(NameTakenError, match=r"used with others in s3://.*/runs/far;"):
            run_folder.check_name(experiment(storage, base={"epochs": 5}))
        with pytest.raises(BusyError, match="'far' in s3://"):
            begin(experiment(storage), "train")


def test_the_record_is_read_for_those_who_have_no_file(storage):
    begin(experiment(storage))
    with run_folder.recorded("far", storage) as file:
        text = file.read_text()
    assert "name: far" in text
    assert f"storage: {storage}" in text
    assert not file.exists()
    with pytest.raises(StorageError, match=r"begun in s3://.*/runs, but 'fra' has not; name one"):
        run_folder.recorded("fra", storage).__enter__()


def test_a_run_and_a_folder_of_checkpoints_are_models(storage, tmp_path):
    trial = f"{storage}/far/run-1/trials/final-0000"
    list(epochs(TrainingJob("toy", toy.Spec(height=0.25), toy.Data(), trial)))
    begin(experiment(storage), finished=True)
    (tmp_path / "scale.txt").write_text("2")
    for model in (f"{storage}/far/run-1", f"{storage}/far/run-1/", trial):
        done = evaluate.evaluate(model, [f"on.scale={tmp_path / 'scale.txt'}"], "toy", tmp_path / "out", "sqlite://")
        assert done.result.measurements[0].value == 0.25 * 2


class Drawn:
    """A trainable that writes its data."""

    Data = toy.Data

    @staticmethod
    def prepare(data, root, *_):
        root.mkdir(parents=True, exist_ok=True)
        made = root / "drawn"
        made.write_text("picture")
        return data.model_copy(update={"diary": str(made), "gate": "/elsewhere"})


def test_built_in_data_are_where_all_nodes_see_them(storage, tmp_path):
    data = tune._prepared(Drawn, experiment(storage), no_progress, S3Files())
    assert (data.diary, data.gate) == (f"{storage}/far/data/drawn", "/elsewhere")
    assert seen_by_another(f"{storage}/far/data") == {"drawn": "picture"}
    here = tune._prepared(Drawn, experiment(str(tmp_path / "here")), no_progress, S3Files())
    assert here.diary == str(tmp_path / "here" / "data" / "drawn")
    assert workspace.read(str(tmp_path / "here" / "data"), "drawn") == "picture"

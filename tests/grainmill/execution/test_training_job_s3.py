"""A training whose folder is in S3, as a worker runs it: without Ray, with the toy and with real images."""

import json
import time
from contextlib import closing
from pathlib import Path

import pytest
import toy
from networks import assert_same, spec
from s3_servers import seen_by_another

from grainmill.errors import StorageError
from grainmill.execution.training_job import LeftNodeError, TrainingJob, epochs
from grainmill.storage import workspace
from multigrain.config.data import DataSettings
from multigrain.models import checkpoint


def test_an_epoch_is_safe_before_it_is_told_and_another_machine_goes_on_from_it(place, tmp_path):
    job = TrainingJob("toy", toy.Spec(), toy.Data(diary=str(tmp_path / "diary")), place)
    with closing(epochs(job)) as results:
        for epoch in (1, 2):
            assert next(results).epoch == epoch
            assert json.loads(seen_by_another(place)["state.json"])["step"] == epoch
    assert list((tmp_path / "work").glob("*/*")) == []
    assert [report.epoch for report in epochs(job)] == [2, 3, 4]  # the last one again: its reader may have died
    computed = (tmp_path / "diary").read_text().split()[1::2]
    assert computed == ["1", "2", "3", "4"]


def test_what_a_training_left_that_had_to_end_at_once_is_safe(place, tmp_path):
    job = TrainingJob("toy", toy.Spec(epochs=2, steps=3), toy.Data(diary=str(tmp_path / "diary")), place)
    with pytest.raises(LeftNodeError):
        list(epochs(job, lambda: True))
    assert json.loads(seen_by_another(place)["state.json"])["step"] == 1
    assert [report.epoch for report in epochs(job)] == [1, 2]
    assert (tmp_path / "diary").read_text().split()[1::2] == ["1", "2", "3", "4", "5", "6"]


def test_a_training_ends_with_the_reason_why_its_checkpoint_is_not_safe(place, door):
    job = TrainingJob("toy", toy.Spec(), toy.Data(), place)
    with closing(epochs(job)) as results:
        next(results)
        door.rule = lambda method, *_: (400, "ExpiredToken") if method == "PUT" else None
        with pytest.raises(StorageError, match=f"{place}/state.json needs credentials that are still good"):
            next(results)


class Interrupted(BaseException):
    """As if the process were killed: nobody handles it."""


def trained(job):
    """All that a training tells, but for its speed."""
    speed = {"views_per_second", "data_wait"}
    return [
        ({name: value for name, value in report.metrics.items() if name not in speed}, report.variants)
        for report in epochs(job)
    ]


def test_a_training_that_is_cut_inside_an_epoch_goes_on_elsewhere_with_the_same_bits(
    place,
    shapes_folder,
    tmp_path,
    monkeypatch,
):
    data = DataSettings(folder=str(shapes_folder))
    calm = TrainingJob("multigrain.trainable", spec(), data, str(tmp_path / "calm"))
    far = TrainingJob("multigrain.trainable", spec(), data, place)
    expected = trained(calm)
    save = checkpoint.Writer.save

    def cut(writer, state):
        save(writer, state)
        writer.wait()
        if state.state["steps"] == 2:  # of three in the first epoch
            while "step-00000002/MANIFEST.json" not in seen_by_another(place, Path.read_bytes):
                time.sleep(0.05)  # another thread brings it there
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(workspace, "POLL_SECONDS", 0.01)
        patched.setattr(checkpoint.Writer, "save", cut)
        with pytest.raises(Interrupted):
            trained(far)
    assert {Path(name).parts[0] for name in seen_by_another(place, Path.read_bytes)} == {
        "step-00000001",
        "step-00000002",
    }
    assert trained(far) == expected
    with workspace.opened(place) as kept:
        for step in sorted((tmp_path / "calm").glob("step-*")):
            ours, theirs = checkpoint.read(step), checkpoint.read(kept.path / step.name)
            assert_same(ours.model, theirs.model)
            assert_same(ours.optimizer, theirs.optimizer)
    assert len(list((tmp_path / "calm").glob("step-*"))) == 2

from types import SimpleNamespace

import pytest
import toy

from grainmill.errors import ResourceError
from grainmill.execution import training_job
from grainmill.execution.training_job import LeftNodeError, TrainingJob, cause, epochs


def test_epochs_are_those_of_the_trainable_with_the_names_of_their_metrics(tmp_path):
    job = TrainingJob("toy", toy.Spec(epochs=2, height=0.5), toy.Data(), str(tmp_path / "checkpoints"))
    first, last = epochs(job)
    assert list(first.metrics) == ["epoch", "score", "cost", "world_size"]
    assert [(report.epoch, report.metrics["score"]) for report in (first, last)] == [(1, 0.25), (2, 0.5)]
    assert [report.variants for report in (first, last)] == [{}, {"twice": {"score": 1.0}}]
    assert (tmp_path / "checkpoints" / "state.json").exists()


def test_hardware_of_all_workers_comes_with_the_first_report(tmp_path, monkeypatch):
    def gather(found, own):
        assert (len(found), own["gpu"]) == (3, "none")
        found[:] = [own, {**own, "gpu": "card"}, own]

    group = SimpleNamespace(get_world_size=lambda: 3, all_gather_object=gather, barrier=lambda: None)
    monkeypatch.setattr(training_job, "_process_group", lambda: group)
    monkeypatch.setattr(training_job.hardware, "machine", lambda: {"gpu": "none", "cpu": "2 x X"})
    first, last = epochs(TrainingJob("toy", toy.Spec(epochs=2), toy.Data(), str(tmp_path)))
    assert first.hardware == {"gpu": "none; card", "cpu": "2 x X"}
    assert last.hardware == {}


def test_training_without_its_gpu_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(training_job.hardware, "lacks_gpu", lambda: True)
    with pytest.raises(ResourceError, match="must train on it"):
        next(epochs(TrainingJob("toy", toy.Spec(), toy.Data(), str(tmp_path / "checkpoints"))))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("rate is nan"), "ValueError: rate is nan"),
        (RuntimeError("Traceback:\n  somewhere\nOSError: disk full\n\n"), "RuntimeError: OSError: disk full"),
        (KeyError(), "KeyError"),
    ],
)
def test_cause_is_the_type_and_the_last_line(error, told):
    assert cause(error) == told


def test_training_that_leaves_its_node_waits_until_all_ranks_have_saved(tmp_path, monkeypatch):
    """The first worker that raises ends its group."""
    events = []
    monkeypatch.setattr(training_job, "_wait_for_all_ranks", lambda: events.append("wait"))
    monkeypatch.setattr(toy, "fit", lambda *_: events.append("save") or iter(()))
    with pytest.raises(LeftNodeError):
        list(epochs(TrainingJob("toy", toy.Spec(), toy.Data(), str(tmp_path))))
    assert events == ["wait", "save", "wait"]

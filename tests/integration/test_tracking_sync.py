"""A search whose tracking server is away most of the time."""

import signal
import threading

import pytest
import toy
from mlflow import MlflowClient
from umpire import Memory, Umpire

from grainmill import trainable
from grainmill.config.experiment import experiment_model
from grainmill.workflows import tune


def search(storage, umpire, name):
    content = {
        "name": name,
        "trainable": "toy",
        "data": {"umpire": umpire.port},
        "space": {"height": {"choice": [0.25, 0.75]}},
        "objective": {"score": "max"},
        "search": {"trials": 3, "scheduler": "none", "sampler": "grid"},
        "winner": {"candidates": 1, "seeds": 1},
        "resources": {"concurrent": 1},
        "storage": str(storage),
    }
    return experiment_model(toy).model_validate(content)


def all_of(client, experiment):
    """Every run of an MLflow experiment: status, parameters, tags and metrics, but nothing that a clock has made."""
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    found = {}
    for run in runs:
        history = {
            key: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
            if key not in ("cpu_seconds", "gpu_seconds")
        }
        tags = {key: run.data.tags[key] for key in ("state", "cause") if key in run.data.tags}
        short = run.info.run_name.removeprefix(f"{experiment} ")
        found[short] = run.info.status, run.data.params, tags, history
    assert len(found) == len(runs)
    return found


@pytest.fixture(scope="module")
def umpire():
    made = Umpire()
    yield made
    made.close()


@pytest.fixture(scope="module")
def calm(ray_cluster, tracking_server, umpire, tmp_path_factory):
    """Runs in MLflow of a search whose server is always available."""
    checked = search(tmp_path_factory.mktemp("calm") / "runs", umpire, "calm")
    tune.tune(checked, tracking_server.uri, None, Memory(), trainable.no_progress)
    return all_of(MlflowClient(tracking_server.uri), "calm")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", ["frozen", "killed"])
def test_a_search_whose_server_is_gone_for_most_of_it_is_told_as_a_calm_one(
    calm, tmp_path, umpire, observer, server, monkeypatch, fault
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    lost = threading.Event()
    monkeypatch.setattr(
        observer, "message", lambda message: lost.set() if "gets the results later" in message else None
    )

    def rule(name, epoch, rank, pid):
        if (name, epoch) == ("trial-0000", 2):
            server.send(signal.SIGSTOP) if fault == "frozen" else server.end(signal.SIGKILL)
        if (name, epoch) == ("trial-0002", 3):  # so far the search got without an answer
            assert lost.wait(60)
            server.send(signal.SIGCONT) if fault == "frozen" else server.start()

    umpire.rule = rule
    checked = search(tmp_path / "runs", umpire, fault)
    outcome = tune.tune(checked, server.uri, None, observer, trainable.no_progress)
    rough = all_of(MlflowClient(server.uri), fault)
    assert rough == calm
    assert {status for status, *_ in rough.values()} == {"FINISHED"}
    assert len(rough) == 1 + 3 + 1
    assert outcome.version.uri == f"models:/{fault}/1"

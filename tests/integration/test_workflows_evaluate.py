"""An evaluation on several workers of real Ray."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy
from toy_models import registered, run, trained

from grainmill.errors import EvaluationError, ResourceError
from grainmill.tracking.mlflow_runs import local_uri
from grainmill.workflows import evaluate

on_ray = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data")  # Ray Train's use of it


@on_ray
def test_two_workers_evaluate_as_one_group(ray_cluster, scale, tmp_path, monkeypatch):
    trained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    done = evaluate.evaluate(
        "model", ["on.scale=scale.txt", "paper=true"], "toy", Path("out"), local_uri(tmp_path), workers=2
    )
    assert {one.name: one.value for one in done.result.measurements} == {"scale/height": 0.5, "scale/workers": 2.0}
    assert done.result.notes == ["a toy, of rank 0"]
    assert done.result.tables[2:] == toy.PUBLISHED
    assert os.listdir(tmp_path / "out") == ["figures.csv"]


@on_ray
def test_what_a_worker_finds_wrong_is_told_as_if_there_were_one(ray_cluster, tmp_path):
    # Rank 0 waits for rank 1, which ends with the error.
    (tmp_path / "scale-0.txt").write_text("2")
    registered(tmp_path)
    with pytest.raises(EvaluationError) as caught:
        run("models:/apples/1", [f"on.scale={tmp_path}/scale-{{rank}}.txt"], tmp_path, workers=2)
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{tmp_path}/scale-1.txt'"
    assert os.listdir(tmp_path / "out") == []


def test_more_workers_than_cpus_are_refused(ray_cluster, scale, tmp_path):
    trained(tmp_path / "model")
    with pytest.raises(ResourceError, match=r"3 workers needs 3 CPU .*cluster has 2; lower --workers"):
        run(tmp_path / "model", [scale], tmp_path, workers=3)


@on_ray
@pytest.mark.parametrize(("gpus", "each"), [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_a_worker_takes_a_cpu_and_a_gpu_if_each_can_have_one(ray_cluster, scale, tmp_path, monkeypatch, gpus, each):
    def trainer(function, *, scaling_config, **rest):
        taken = scaling_config.num_workers, scaling_config.num_cpus_per_worker, scaling_config.num_gpus_per_worker
        return SimpleNamespace(fit=lambda: SimpleNamespace(return_value=taken))

    trained(tmp_path / "model")
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0, "GPU": float(gpus)})
    monkeypatch.setattr("ray.train.torch.TorchTrainer", trainer)
    assert run(tmp_path / "model", [scale], tmp_path, workers=2).result == (2, 1, each)

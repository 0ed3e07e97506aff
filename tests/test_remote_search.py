"""The real command with its storage in S3: the machine that runs it dies, and another carries on."""

import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

import mlflow
import optuna
import pytest
import yaml
from conftest import TESTS
from test_cli import left_behind
from test_kills import once
from test_remote import moto  # noqa: F401  # a fixture

from grainmill import catalog, launch
from grainmill.experiment import load
from grainmill.tracking import local_uri

COMMAND = """
    from grainmill import tenure
    tenure.EXPIRES_SECONDS = 3.0
    from grainmill.cli import app
    app()
"""
"""The command, in a hurry about dead processes."""


def end_machine(mark):
    """All that runs on it is gone at once."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
    return True


def told(url, name):
    """What a study knows, but for times and costs."""
    study = optuna.load_study(study_name=name, storage=url)
    given = [trial for trial in study.trials if "setting" in trial.user_attrs]
    return [
        (
            *(trial.state.name, trial.values, trial.user_attrs["setting"]),
            [(row["epoch"], row["score"]) for row in trial.user_attrs["history"]],
        )
        for trial in given
    ]


@pytest.mark.slow
def test_another_machine_carries_on_a_search_whose_machine_died(tmp_path, moto, umpire, ray_cluster, watch):  # noqa: F811
    content = {
        "name": "far",
        "trainable": "toy",
        "data": {"diary": str(tmp_path / "diary"), "umpire": umpire.port},
        "space": {"height": {"uniform": [0.0, 1.0]}},
        "base": {"epochs": 3},
        "objective": {"score": "max"},
        "search": {"trials": 3, "scheduler": "none", "sampler": "random"},
        "winner": {"candidates": 1, "seeds": 1},
        "resources": {"concurrent": 1},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content))
    calm = load(tmp_path / "toy.yaml", [f"storage={tmp_path / 'calm'}", f"data.diary={tmp_path / 'calm diary'}"])
    launch.tune(calm, local_uri(tmp_path / "calm"), None, watch, catalog.untracked)

    bucket, tracking = f"bucket-{uuid.uuid4().hex}", f"sqlite:///{tmp_path / 'mlflow.db'}"
    moto.client.create_bucket(Bucket=bucket)
    places = [f"storage=s3://{bucket}/runs", f"tracking.uri={tracking}"]

    def tune(machine, *words):
        (tmp_path / machine / "here").mkdir(parents=True)
        command = [sys.executable, "-c", textwrap.dedent(COMMAND), "tune", *words]
        command += [word for one in places for word in ("--set", one)]
        environment = {name: text for name, text in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_TRACK"))}
        environment |= {"HOME": str(tmp_path / machine), "GRAINMILL_TEST": f"{mark}-{machine}"}
        environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        environment |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{moto.port}", "AWS_DEFAULT_REGION": "us-east-1"}
        environment |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "very-secret"}
        return subprocess.run(
            command,
            cwd=tmp_path / machine / "here",
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )

    mark = str(uuid.uuid4())
    umpire.rule = once(("trial-0001", 2, 0), lambda _: end_machine(f"{mark}-first"))
    died = tune("first", str(tmp_path / "toy.yaml"))
    assert died.returncode == -signal.SIGKILL, died.stdout
    assert left_behind(mark) == []
    last = tune("second", "--resume", "far")
    assert last.returncode == 0, last.stdout
    assert left_behind(mark) == []
    assert "'far' was left by process" in last.stdout
    assert f"s3://{bucket}/runs/far/run-1/report.html" in last.stdout
    assert "very-secret" not in died.stdout + last.stdout
    assert list((tmp_path / "second" / "here").iterdir()) == []

    objects = {one["Key"] for one in moto.client.list_objects_v2(Bucket=bucket)["Contents"]}
    top = {key.removeprefix("runs/far/") for key in objects if "/ray/" not in key and "/trials/" not in key}
    run = {f"run-1/{name}" for name in ("done.json", "parent-run", "report.html", "study.db")}
    assert {name for name in top if "report/" not in name and "mlflow" not in name} == {
        *(".index.json", "data/.index.json", "experiment.yaml"),
        *run,
    }
    moto.client.download_file(bucket, "runs/far/run-1/study.db", str(tmp_path / "study.db"))
    for name in ("trial", "final"):
        expected = told(f"sqlite:///{tmp_path / 'calm/far/run-1/study.db'}", name)
        assert told(f"sqlite:///{tmp_path / 'study.db'}", name) == expected
    computed = Counter((tmp_path / "diary").read_text().splitlines())
    assert computed.keys() == set((tmp_path / "calm diary").read_text().splitlines())
    assert {line: count for line, count in computed.items() if count > 1} == {"trial-0001 2": 2}

    client = mlflow.MlflowClient(tracking)
    version = client.get_model_version_by_alias("far", "champion")
    assert version.version == "1"
    files = client.get_run(version.run_id).info.artifact_uri
    assert files.startswith(f"s3://{bucket}/runs/mlflow-artifacts/far/")
    runs = client.search_runs([client.get_experiment_by_name("far").experiment_id])
    names = [*(f"trial-{n:04d}" for n in range(3)), "final-0000", "far run-1"]
    assert sorted((run.info.run_name, run.info.status) for run in runs) == sorted((name, "FINISHED") for name in names)

"""The real command with its storage in S3: the machine that runs it dies, and another carries on."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import mlflow
import optuna
import pytest
import yaml
from commands import left_behind, python_path
from mlflow_tables import database
from networks import FILES
from umpire import once

from grainmill import trainable
from grainmill.config.experiment import load
from grainmill.workflows import tune

COMMAND = """
    from grainmill.storage import lock
    lock.EXPIRES_SECONDS, lock.RENEW_SECONDS = 3.0, 1.0
    from grainmill.cli.app import app
    app()
"""
"""The command, in a hurry about dead processes."""

PROFILE = """
    [profile far]
    endpoint_url = http://127.0.0.1:{port}
    region = us-east-1
    aws_access_key_id = key
    aws_secret_access_key = very-secret
"""


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


@pytest.fixture
def far(tmp_path, moto):
    """A bucket, and a command that is run by a machine of a name with nothing else to write to."""
    bucket, mark = f"bucket-{uuid.uuid4().hex}", str(uuid.uuid4())
    moto.client.create_bucket(Bucket=bucket)
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def grainmill(machine, *words):
        (tmp_path / machine / "here").mkdir(parents=True)
        command = [sys.executable, "-c", textwrap.dedent(COMMAND), *words]
        command += ["--set", f"storage=s3://{bucket}/runs", "--set", f"tracking.uri={tracking}"]
        environment = {name: text for name, text in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_TRACK"))}
        environment |= {"HOME": str(tmp_path / machine), "GRAINMILL_TEST": f"{mark}-{machine}"}
        environment |= {"PYTHONPATH": python_path()}
        (tmp_path / machine / ".aws").mkdir()
        (tmp_path / machine / ".aws" / "config").write_text(textwrap.dedent(PROFILE).format(port=moto.port))
        environment["AWS_PROFILE"] = "far"  # endpoint and credentials are nowhere else
        done = subprocess.run(
            command,
            cwd=tmp_path / machine / "here",
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert left_behind(mark) == []
        assert "very-secret" not in done.stdout
        return done

    def listed():
        pages = moto.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="runs/far/")
        keys = {one["Key"].removeprefix("runs/far/") for page in pages for one in page["Contents"]}
        return {key for key in keys if key and not key.endswith("/")}  # Ray makes objects that stand for folders

    def read(key):
        return moto.client.get_object(Bucket=bucket, Key=f"runs/far/{key}")["Body"].read()

    return SimpleNamespace(
        url=f"s3://{bucket}/runs/far", grainmill=grainmill, tracking=tracking, mark=mark, listed=listed, read=read
    )


def test_another_machine_carries_on_a_search_whose_machine_died(tmp_path, far, umpire, ray_cluster, observer):
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
    tune.tune(calm, database(tmp_path / "calm"), None, observer, trainable.no_progress)

    umpire.rule = once(("trial-0001", 2, 0), lambda _: end_machine(f"{far.mark}-first"))
    died = far.grainmill("first", "tune", str(tmp_path / "toy.yaml"))
    assert died.returncode == -signal.SIGKILL, died.stdout
    last = far.grainmill("second", "tune", "--resume", "far")
    assert last.returncode == 0, last.stdout
    assert f"{far.url}/run-1/report.html" in last.stdout
    assert list((tmp_path / "second" / "here").iterdir()) == []

    run = {f"run-1/{name}" for name in ("done.json", "parent-run", "report.html", "study.db")}
    own = {key for key in far.listed() if not key.startswith(("run-1/trials/", "run-1/report/"))}
    assert own == {".index.json", "experiment.yaml", *run}
    (tmp_path / "study.db").write_bytes(far.read("run-1/study.db"))
    for name in ("trial", "final"):
        expected = told(f"sqlite:///{tmp_path / 'calm/far/run-1/study.db'}", name)
        assert told(f"sqlite:///{tmp_path / 'study.db'}", name) == expected
    computed = Counter((tmp_path / "diary").read_text().splitlines())
    assert computed.keys() == set((tmp_path / "calm diary").read_text().splitlines())
    assert {line: count for line, count in computed.items() if count > 1} == {"trial-0001 2": 2}

    client = mlflow.MlflowClient(far.tracking)
    version = client.get_model_version_by_alias("far", "champion")
    assert str(version.version) == "1"
    assert "/runs/mlflow-artifacts/far/" in client.get_run(version.run_id).info.artifact_uri
    runs = client.search_runs([client.get_experiment_by_name("far").experiment_id])
    names = [*(f"trial-{n:04d}" for n in range(3)), "final-0000", "far run-1"]
    assert sorted((run.info.run_name, run.info.status) for run in runs) == sorted((name, "FINISHED") for name in names)


def test_a_group_trains_on_built_in_images_with_nothing_but_a_bucket(tmp_path, far):
    content = {
        "name": "far",
        "data": {"builtin": "shapes", "images": 40, "image_size": 32},
        "base": {"image_size": 32, "epochs": 2, "model": {"trunk": "narrow"}, "batch": {"size": 24}},
        "objective": {"top1": "max"},
        "resources": {"retrain_workers": 2},
    }
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump(content))
    done = far.grainmill("one", "train", str(tmp_path / "shapes.yaml"))
    assert done.returncode == 0, done.stdout
    assert "models:/far/1, alias champion" in done.stdout
    keys = far.listed()
    assert len({key for key in keys if re.fullmatch(r"data/shapes-40x32/(train|val)/\w+/\w+\.png", key)}) == 40
    index = set(json.loads(far.read("train-1/trials/final-0000/.index.json"))["files"])
    steps = {name.partition("/")[0] for name in index}
    assert len(steps) == 2
    assert index == {f"{step}/{name}" for step in steps for name in FILES}
    assert {key for key in keys if "/trials/" in key} == {
        f"train-1/trials/final-0000/{name}" for name in index | {".index.json"}
    }

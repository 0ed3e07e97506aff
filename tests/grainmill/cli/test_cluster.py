"""The command `grainmill plan` and what it reads of an earlier run, and the list of files of `grainmill submit`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy
import yaml
from commands import python_path
from typer.testing import CliRunner

from grainmill.cli.app import app
from grainmill.config.experiment import experiment_model
from grainmill.errors import StorageError
from grainmill.search.study import Study
from grainmill.workflows import forecast

AWS = Path(__file__).parents[3] / "infra" / "aws" / "cluster.yaml"


def files(folder, **changes):
    """An experiment of the toy, and a cluster of two nodes."""
    content = {"name": "toy", "trainable": "toy", "data": {}, "objective": {"score": "max"}, "base": {"epochs": 4}}
    content |= {"space": {"height": {"uniform": [0.0, 1.0]}}, "winner": {"candidates": 1, "seeds": 1}}
    content |= {"search": {"trials": 3, "scheduler": "none"}}
    types = {"head": {"resources": {"CPU": 0}}, "worker": {"resources": {"CPU": 1}, "max_workers": 2}}
    cluster = {"available_node_types": types, "head_node_type": "head", "idle_timeout_minutes": 30}
    cluster["provider"] = {"type": "aws", "prices": {"head": 0.5, "worker": 2.0}}
    (folder / "toy.yaml").write_text(yaml.safe_dump({**content, **changes}))
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    return [str(folder / "toy.yaml"), "--cluster", str(folder / "cluster.yaml")]


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})


def told(output):
    """Cells of the tables by the first of their row."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def test_all_that_a_search_takes_is_told_before_it_starts(tmp_path):
    done = plan(*files(tmp_path), "--epoch-seconds", "3600", "--boot-minutes", "60")
    assert done.exit_code == 0
    assert "3 trials, 2 at once (1 CPU each), in 2 waves" in done.output
    rows = told(done.output)
    # Booting 1 h; two trials until 5 h, one until 9 h, the best again until 13 h on the same node; the other goes at
    # 5.5 h, and this one at 13.5 h, with the head.
    assert rows["hours"] == ["9", "4", "13"]
    assert rows["epochs"] == ["12", "4", "16"]
    assert rows["CPU-hours"] == ["12", "4", "16"]
    assert "accelerator-hours" not in rows
    assert rows["worker"] == ["19", "38"]
    assert rows["head"] == ["13.5", "6.75"]
    assert rows["of these, booting"][0] == "2"
    assert rows["waiting for other trials"][0] == "0"
    assert rows["without work, until they go"][0] == "1"
    assert "price: 44.8 dollars" in done.output


def test_without_prices_there_are_hours_alone(tmp_path):
    arguments = files(tmp_path)
    cluster = yaml.safe_load((tmp_path / "cluster.yaml").read_text())
    del cluster["provider"]["prices"]["worker"]
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    done = plan(*arguments, "--epoch-seconds", "3600")
    assert done.exit_code == 0
    assert "no price for worker" in done.output
    assert "price:" not in done.output
    assert told(done.output)["worker"][1] == "?"


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    experiment, *_ = files(tmp_path, base={"epochs": 0, "heigth": 1})
    done = plan(experiment, "--cluster", str(tmp_path / "none.yaml"), "--like", str(tmp_path / "run-1"))
    assert done.exit_code == 2
    for part in ("base.heigth", "none.yaml: 1 problem", f"there is no {tmp_path / 'run-1' / 'study.db'}"):
        assert part in done.output


def test_what_no_node_type_can_give_is_refused_for_the_search_and_for_the_best_again(tmp_path):
    resources = {"gpus_per_worker": 2, "retrain_workers": 9}
    done = plan(*files(tmp_path, resources=resources), "--epoch-seconds", "60")
    assert done.exit_code == 2
    assert "one worker needs 1 CPU and 2 GPU, but no node type has more than 0 GPU" in done.output
    done = plan(*files(tmp_path, resources={"retrain_workers": 9}), "--epoch-seconds", "60")
    assert done.exit_code == 2
    assert "a trial needs 9 workers of 1 CPU each, but the cluster has room for 2 at most" in done.output


@pytest.mark.parametrize("times", [[], ["--epoch-seconds", "1", "--like", "run-1"]])
def test_the_time_of_an_epoch_is_asked_for_once(tmp_path, times):
    done = plan(*files(tmp_path), *times)
    assert done.exit_code == 2
    assert "--epoch-seconds" in done.output


def studied(folder, reports):
    """A run's study: for each trial the seconds at which its epochs were reported."""
    content = {"name": "toy", "trainable": "toy", "data": {}, "objective": {"score": "max"}}
    checked = experiment_model(toy).model_validate({**content, "space": {"height": {"uniform": [0.0, 1.0]}}})
    study = Study(f"sqlite:///{folder / 'study.db'}", "trial", checked, checked.first, 9)
    for seconds in reports:
        number = study.ask().number
        study.note(number, "history", [{"epoch": epoch, "at": 1000 * at} for epoch, at in enumerate(seconds, 1)])


def test_an_earlier_run_tells_the_median_time_of_an_epoch(tmp_path):
    studied(tmp_path, [[10, 12, 15], [11], [100, 104, 1104]])  # 2, 3, 4, and 1000 with a pause
    assert forecast.epoch_seconds(tmp_path) == 3.5
    done = plan(*files(tmp_path), "--like", str(tmp_path))
    assert "3.5 seconds an epoch" in done.output


def test_an_earlier_run_without_two_epochs_is_refused(tmp_path):
    studied(tmp_path, [[10], [11]])
    with pytest.raises(StorageError, match="no trial has two; give --epoch-seconds"):
        forecast.epoch_seconds(tmp_path)
    (tmp_path / "study.db").write_text("no database")
    with pytest.raises(StorageError, match=r"cannot be read .* give --epoch-seconds"):
        forecast.epoch_seconds(tmp_path)


def test_neither_ray_nor_torch_is_loaded_and_nothing_is_written(tmp_path):
    code = "import sys; from grainmill.cli.app import app; app(sys.argv[1:], standalone_mode=False)"
    code += "; print({'ray', 'torch', 'mlflow'} & set(sys.modules))"
    arguments = files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", *arguments, "--epoch-seconds", "60"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "set()"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_file_for_aws_is_priced(tmp_path):
    experiment, *_ = files(tmp_path)
    done = plan(experiment, "--cluster", str(AWS), "--epoch-seconds", "600")
    assert done.exit_code == 0
    assert "dollars, by the table in the cluster file" in done.output


def test_what_a_job_sends_is_listed_without_a_cluster(tmp_path, monkeypatch):
    package = tmp_path / "pears"
    package.mkdir()
    (package / "__init__.py").write_text(Path(toy.__file__).read_text())
    for name in ("prod.env", "id_rsa", "[b].txt", ".env"):
        (package / name).write_text("abc")
    monkeypatch.syspath_prepend(tmp_path)
    file, *_ = files(tmp_path, trainable="pears")
    done = CliRunner().invoke(app, ["submit", "tune", file, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "           3  trainables/pears/[b].txt\n" in done.stdout
    assert "platform/grainmill/cli/cluster.py" in done.stdout
    assert ".env (1)" in done.stdout
    for name in ("prod.env", "id_rsa"):
        assert f"  trainables/pears/{name}" not in done.stdout
        assert f"trainables/pears/{name} may hold keys or credentials, by its name, and is left out" in done.stderr
    refused = CliRunner().invoke(app, ["submit", "tune", file])
    assert refused.exit_code == 2
    assert "--address http://HEAD:8265" in refused.output

"""Nothing is lost of a search when something dies: a training, a worker, a group's driver, a node, the command."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import uuid
from collections import Counter
from contextlib import suppress

import mlflow
import optuna
import pytest
import ray
import yaml
from commands import left_behind, python_path, run_whole
from mlflow_tables import database
from umpire import kill, once

from grainmill.errors import SearchError
from grainmill.execution import runner
from grainmill.tracking.mlflow_runs import local_uri

KILLS = 2
"""Of one and the same command, one after the other."""


def test_training_that_is_killed_goes_on_from_its_checkpoint(arena):
    arena.umpire.rule = once(("trial-0001", 3, 0), kill)
    records = arena.run(arena.grid([0.25, 0.75]), concurrent=1)
    arena.check(records, [0.25, 0.75], ["trial-0001 3"])
    assert "trial-0001: its process died in epoch 3; goes on from its last checkpoint" in arena.observer.notes
    assert [record.interruptions for record in records][:2] == [(), ("in epoch 3: its process died",)]


def test_group_that_loses_a_worker_goes_on_from_its_checkpoint(arena):
    arena.umpire.rule = once(("trial-0001", 3, 1), kill)
    records = arena.run(arena.grid([0.25]), workers=2)
    arena.check(records, [0.25], ["trial-0001 3"])
    assert "trial-0001: its workers began again in epoch 3; goes on from its last checkpoint" in arena.observer.notes
    assert [record.interruptions for record in records] == [(), ("in epoch 3: its workers began again",)]


@pytest.mark.parametrize(
    ("who", "why"),
    [("ImplicitFunc", "its process died"), ("TrainController", "its workers began again")],
    ids=["driver", "controller"],
)
def test_group_that_loses_its_head_goes_on_from_its_checkpoint(arena, who, why):
    from ray.util.state import list_actors

    def behead(pid):
        where, asked = ray.get_runtime_context().gcs_address, [("state", "=", "ALIVE"), ("class_name", "=", who)]
        for actor in list_actors(address=where, filters=asked):  # one of an earlier search may be about to end
            with suppress(ProcessLookupError):
                kill(actor.pid)
        return True

    arena.umpire.rule = once(("trial-0001", 3, 0), behead)
    records = arena.run(arena.grid([0.25]), workers=2)
    arena.check(records, [0.25], ["trial-0001 3"])
    assert [record.interruptions for record in records] == [(), (f"in epoch 3: {why}",)]


def test_training_that_dies_too_often_fails_and_the_others_go_on(arena):
    deaths = []

    def rule(name, epoch, rank, pid):
        if name == "trial-0001" and epoch == 2:
            deaths.append(pid)
            kill(pid)

    arena.umpire.rule = rule
    records = arena.run(arena.grid([0.25, 0.75]), concurrent=1)
    assert [record.state for record in records] == ["complete", "failed", "complete"]
    assert len(set(deaths)) == 1 + runner.RESTARTS
    assert "died" in records[1].cause
    runs = {run.info.run_name: (run.info.status, run.data.tags.get("cause")) for run in arena.all_runs()}
    assert runs["trial-0001"] == ("FAILED", records[1].cause)
    assert len(runs) == len(arena.all_runs()) == 3
    assert Counter(arena.computed())["trial-0001 1"] == 1


def test_objective_that_is_no_number_fails_its_trial_at_the_first_report(arena):
    records = arena.run(arena.study(2, space={"kind": {"choice": ["nan"]}}, search={"scheduler": "none"}))
    assert [record.state for record in records] == ["complete", "failed"]
    assert records[1].cause == "score is nan after epoch 1"
    assert [epoch for name, epoch, _, _ in arena.umpire.heard if name == "trial-0001"] in ([1], [1, 2])


def test_search_whose_trials_mostly_fail_is_stopped_naming_the_cause(arena):
    study = arena.grid([n / 16 for n in range(16)], base={"kind": "broken"})
    with pytest.raises(SearchError, match=r"5 of 5 failed, 5 of them so: RuntimeError: the toy is broken; put that"):
        arena.run(study, concurrent=1)
    assert len(study.records) < 10


NODE_DIES = """
    import os, signal, sys
    from pathlib import Path
    import ray
    from servers import free_port
    from umpire import Memory, Umpire, once
    from ray.cluster_utils import Cluster
    from arena import Arena

    def kill_node(pid):
        "The parent of a worker is the raylet of its node."
        raylet = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert "raylet" in Path(f"/proc/{raylet}/cmdline").read_text()
        os.kill(raylet, signal.SIGKILL)
        return True

    port = free_port()
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    umpire = Umpire()
    arena = Arena(Path(sys.argv[1]), umpire, Memory())
    umpire.rule = once(("trial-0001", 3, 0), kill_node)
    records = arena.run(arena.grid([0.25, 0.75]), concurrent=1)
    arena.check(records, [0.25, 0.75], ["trial-0001 3"])
    assert len({pid for name, _, _, pid in umpire.heard if name == "trial-0001"}) == 2
    umpire.close()
    ray.shutdown()
    cluster.shutdown()
    print("nothing lost")
"""


NO_DASHBOARD = """
    import sys
    from dataclasses import replace
    from pathlib import Path
    import ray
    from arena import Bench
    from mlflow_tables import database
    from umpire import Memory
    from grainmill.execution import runner
    from grainmill.search.study import Study
    from grainmill.tracking.mlflow_runs import Tracker

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    folder = Path(sys.argv[1])
    bench = Bench(folder, Tracker(database(folder), "toy", folder), Memory())
    for name in ("trial", "final"):
        setup = bench.setup(workers=2)
        study = Study(f"sqlite:///{folder / name}.db", name, bench.study(1).experiment, [{"height": 0.5}], 1)
        setup = replace(setup, study=name)
        runner.run(setup, study, bench.tracker, bench.parent, bench.observer)
        assert [record.state for record in study.records] == ["complete"]
    ray.shutdown()
    print("nothing lost")
"""
"""Two searches, one after the other, each with a group that needs all CPUs: the first one's must be free again."""


@pytest.mark.parametrize("script", [NODE_DIES, NO_DASHBOARD], ids=["node dies", "no dashboard"])
def test_cluster_of_its_own_loses_nothing(tmp_path, script, ray_cluster):  # beside another Ray on this machine
    run_whole(script, tmp_path)


MORTAL = """
    import os, signal, sqlalchemy
    left = int(os.environ["COMMITS"])

    @sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "commit")
    def commit(connection):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    from grainmill.cli.app import app
    app()
"""
"""The command, which dies when it is about to write into its databases for so many times."""


def test_command_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path, umpire):
    content = {
        "name": "mortal",
        "trainable": "toy",
        "data": {"diary": str(tmp_path / "diary"), "umpire": umpire.port},
        "space": {"height": {"choice": [0.25, 0.75]}},
        "base": {"epochs": 2},
        "objective": {"score": "max"},
        "search": {"trials": 3, "scheduler": "none", "sampler": "grid"},
        "winner": {"candidates": 1, "seeds": 1},
        "resources": {"concurrent": 1},
        "storage": str(tmp_path / "runs"),
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content))
    database(tmp_path / "runs")  # MLflow cannot be killed while it makes tables
    mark, moments = str(uuid.uuid4()), random.Random(7)
    environment = {**os.environ, "PYTHONPATH": python_path(), "GRAINMILL_TEST": mark}

    def tune(commits):
        command = [sys.executable, "-c", textwrap.dedent(MORTAL), "tune", "toy.yaml"]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, "COMMITS": str(commits)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )

    for _ in range(KILLS):
        died = tune(commits := moments.randrange(30, 60))
        assert died.returncode == -signal.SIGKILL, (commits, died.stdout)
        assert left_behind(mark) == []
    last = tune(-1)
    assert last.returncode == 0, last.stdout
    assert left_behind(mark) == []
    assert "3 trials: 3 complete" in last.stdout
    assert "models:/mortal/1, alias champion" in last.stdout

    stored = optuna.load_study(study_name="trial", storage=f"sqlite:///{tmp_path / 'runs/mortal/run-1/study.db'}")
    given = [trial for trial in stored.trials if "setting" in trial.user_attrs]
    assert [(trial.user_attrs["setting"], trial.values) for trial in given] == [
        ({"height": height}, [height]) for height in (0.5, 0.25, 0.75)
    ]
    computed = Counter((tmp_path / "diary").read_text().splitlines())
    names = [*(f"trial-{trial.number:04d}" for trial in given), "final-0000"]
    assert computed.keys() == {f"{name} {epoch}" for name in names for epoch in (1, 2)}
    assert computed.total() <= len(computed) + KILLS  # a kill costs at most the epoch that it cuts short
    client = mlflow.MlflowClient(local_uri(tmp_path / "runs"))
    runs = client.search_runs([client.get_experiment_by_name("mortal").experiment_id])
    found = sorted((run.info.run_name, run.info.status) for run in runs)
    assert found == sorted((name, "FINISHED") for name in [*names, "mortal run-1"])
    for run in runs:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "score")]
        assert steps == ([2] if run.info.run_name == "mortal run-1" else [1, 2])

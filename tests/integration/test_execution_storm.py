"""A storm: whatever a search runs on is killed at random, again and again, and it ends as a calm one does.

The machines are real Ray nodes on this one, each of processes of its own. What dies when is drawn from `SEED`.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter

import mlflow
import optuna
import pytest
import yaml
from commands import COMMAND, left_behind
from machines import SEEN, TOKEN, Machines

SEED = 7
"""Another storm is as good; this one is the same each time, as far as the processes let it."""
GAP = (3, 5)
"""Epochs that are reached between two deeds, at least and at most."""
EPOCHS = 4
HEIGHTS = (0.125, 0.25, 0.375, 0.625)


class Storm:
    """The umpire's rule: lets processes die, and takes down how long it took until their epoch was reached again."""

    def __init__(self, machines, server):
        self.machines, self.server = machines, server
        self.driver = None
        self.calm = threading.Lock()
        self.chance = random.Random(SEED)
        self.deeds = [self.training, self.machine, self.command, self.training, self.tracking, self.machine, self.head]
        self.chance.shuffle(self.deeds)
        self.gap = self.chance.randint(*GAP)
        self.hits, self.struck, self.recovered = Counter(), {}, []

    def __call__(self, name, epoch, rank, pid):
        if since := self.struck.pop((name, epoch), None):
            deed, began = since
            self.recovered.append((deed, name, epoch, time.monotonic() - began))
        self.gap -= 1
        if self.gap > 0 or not self.deeds or self.hits[name] == 2:  # a trial may die three times
            return False
        self.gap = self.chance.randint(*GAP)
        deed = self.deeds.pop()
        self.hits[name] += 1
        began = time.monotonic()
        with self.calm:
            if dies := deed(pid):
                self.struck[name, epoch] = deed.__name__, began
            return dies

    # What each does to the process with this number, or to what it needs; True if that dies with it.

    def training(self, pid):
        os.kill(pid, signal.SIGKILL)
        return True

    def machine(self, pid):
        self.machines.lose(pid)
        return True

    def command(self, pid):
        self.driver.kill()
        return True

    def tracking(self, pid):
        self.server.end(signal.SIGKILL)
        self.server.start()
        return False

    def head(self, pid):
        """With the command, which runs there, and all machines: they are nothing without it."""
        self.driver.kill()
        self.machines.close()
        self.machines.open()
        return True


@pytest.fixture
def machines():
    with tempfile.TemporaryDirectory() as folder:
        made = Machines(folder)
        try:
            made.open()
            yield made
        finally:
            made.close()


def test_search_in_a_storm_ends_as_a_calm_one(tmp_path, umpire, server, machines):
    content = {
        "name": "storm",
        "trainable": "toy",
        "data": {"diary": str(tmp_path / "diary"), "umpire": umpire.port},
        "space": {"height": {"choice": [*HEIGHTS]}},
        "base": {"epochs": EPOCHS},
        "objective": {"score": "max"},
        "search": {"trials": 1 + len(HEIGHTS), "scheduler": "none", "sampler": "grid"},
        "winner": {"candidates": 2, "seeds": 1},
        "resources": {"concurrent": 2, "retrain_workers": 2},
        "storage": str(tmp_path / "runs"),
    }
    (tmp_path / "storm.yaml").write_text(yaml.safe_dump(content))
    mark = str(uuid.uuid4())
    environment = {**os.environ, **TOKEN, **SEEN, "GRAINMILL_TEST": mark}
    environment |= {"MLFLOW_TRACKING_URI": server.uri, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    umpire.rule = storm = Storm(machines, server)
    began, starts, said = time.monotonic(), 0, tmp_path / "said"
    while storm.driver is None or storm.driver.returncode == -signal.SIGKILL:
        with storm.calm, said.open("w") as log:
            command = [sys.executable, "-c", COMMAND, "tune", "storm.yaml", "--address", machines.address]
            storm.driver = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
            starts += 1
        storm.driver.wait()
    assert storm.driver.returncode == 0, said.read_text()
    assert left_behind(mark) == []
    print(f"seed {SEED}: {starts} starts, {time.monotonic() - began:.0f} s")
    for deed, name, epoch, seconds in storm.recovered:
        print(f"{deed:9} {name} epoch {epoch}: reached again after {seconds:.1f} s")
    assert (storm.deeds, storm.struck) == ([], {})

    # All heights were tried, each once and to its end; the best two were trained again.
    names = {"trial": 1 + len(HEIGHTS), "final": 2}
    heights = {"trial": (0.5, *HEIGHTS), "final": (0.625, 0.5)}
    for study, count in names.items():
        stored = optuna.load_study(study_name=study, storage=f"sqlite:///{tmp_path / 'runs/storm/run-1/study.db'}")
        given = [trial for trial in stored.trials if "setting" in trial.user_attrs]
        assert [(trial.number, trial.values) for trial in given] == [(n, [heights[study][n]]) for n in range(count)]
        for trial in given:
            rows = [(row["epoch"], row["score"]) for row in trial.user_attrs["history"]]
            assert rows == [(epoch, heights[study][trial.number] * epoch / EPOCHS) for epoch in range(1, EPOCHS + 1)]
    # An epoch that was cut short was computed again, and no other.
    computed = Counter((tmp_path / "diary").read_text().splitlines())
    assert computed.keys() == {
        f"{study}-{n:04d} {epoch}" for study, count in names.items() for n in range(count) for epoch in range(1, 5)
    }
    lost = computed.total() - len(computed)
    print(f"{lost} epochs computed again")
    assert lost <= 2 * sum(storm.hits.values())  # of two trainings at once
    # One run for each trial, with each epoch once, and one model.
    client = mlflow.MlflowClient(server.uri)
    runs = client.search_runs([client.get_experiment_by_name("storm").experiment_id])
    trials = [f"{study}-{n:04d}" for study, count in names.items() for n in range(count)]
    found = sorted((run.info.run_name, run.info.status) for run in runs)
    assert found == sorted((name, "FINISHED") for name in [*trials, "storm run-1"])
    for run in runs:
        if run.info.run_name in trials:
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "score")]
            assert steps == list(range(1, EPOCHS + 1))
    assert [version.version for version in client.search_model_versions("name = 'storm'")] == ["1"]

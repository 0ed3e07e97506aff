"""Overhead of a trial: ours against plain Ray Tune, on one worker and on two.

    python -m tests.benchmarks.trials [--rounds 3] [--trials 40] [--pairs 5] [--many 1000]

The trainable does nothing, and one trial runs at a time. The first trial of a search, which starts the processes, is
not counted. Ours records every trial in a SQLite study and in MLflow; Tune writes only its own files. `--many` is the
number of trials of one more search of ours, for its time and memory; 0 leaves it out.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from grainmill.config.experiment import experiment_model
from grainmill.config.resources import Resources
from grainmill.execution import runner
from grainmill.execution.training_job import StudySetup
from grainmill.search.study import Study
from grainmill.tracking.mlflow_runs import Tracker, local_uri
from tests.benchmarks.table import Goal, compare, machine, report
from tests.support import toy

POLL = "0.5"
"""Interval in seconds at which Ray Train polls its workers, for both contestants; its default of 2 is slower."""


class Ends(tune.Callback):
    """Records the end of each trial: a callback for Tune, and an `Observer` for ours."""

    def __init__(self):
        self.times = []

    def on_trial_complete(self, iteration, trials, trial, **info):
        self.times.append(time.perf_counter())

    def message(self, message):
        pass

    def trial(self, name, record):
        if record.state == "complete":
            self.times.append(time.perf_counter())

    @property
    def milliseconds(self):
        """Mean time from the end of one trial to the end of the next."""
        return 1e3 * (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def ours(workers, count):
    """Milliseconds per trial of ours."""
    ends = Ends()
    content = {
        "name": "toy",
        "trainable": "tests.support.toy",
        "data": {},
        "base": {"epochs": 1},
        "space": {"height": {"uniform": [0.0, 1.0]}},
        "objective": {"score": "max"},
        "search": {"sampler": "random", "scheduler": "none", "trials": count},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checked = experiment_model(toy).model_validate(content)
        tracker = Tracker(local_uri(folder), "toy", folder)
        study = Study(f"sqlite:///{folder / 'study.db'}", "trial", checked, checked.first, count)
        setup = StudySetup("trial", "tests.support.toy", toy.Data(), str(folder), Resources(concurrent=1), workers)
        runner.run(setup, study, tracker, tracker.start("parent", {}), ends)
    assert len(ends.times) == count, "every trial is complete"
    return ends.milliseconds


def nothing(config):
    ray.train.report({"score": 1.0})


def alone(config):
    tune.report({"score": config["height"]})


def pair(config):
    with tempfile.TemporaryDirectory() as folder:
        scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.45})
        TorchTrainer(nothing, scaling_config=scaling, run_config=RunConfig(storage_path=folder)).fit()
    tune.report({"score": config["height"]})


def plain_tune(function, count, reuse):
    """Milliseconds per trial of Ray Tune."""
    ends = Ends()
    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            tune.with_resources(function, {"CPU": 0.1}),
            param_space={"height": tune.uniform(0.0, 1.0)},
            tune_config=tune.TuneConfig(num_samples=count, max_concurrent_trials=1, reuse_actors=reuse),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[ends]),
        ).fit()
    return ends.milliseconds


def many(count):
    """Print time and memory of a long search."""
    started = time.perf_counter()
    each = ours(1, count)
    seconds, memory = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"a search of {count:,} trials, one at a time: {seconds:.0f} s, {each:.0f} ms each; {memory:.2f} GiB at most")


@contextmanager
def cluster() -> Iterator[None]:
    environment = {"env_vars": {"PYTHONPATH": os.getcwd(), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL}}
    store = 128 * 2**20
    ray.init("local", num_cpus=2, object_store_memory=store, log_to_driver=False, runtime_env=environment)
    try:
        yield
    finally:
        ray.shutdown()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--many", type=int, default=1000)
    options = parser.parse_args()
    before = machine()
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    measures = {
        "ours, one worker": lambda: ours(1, options.trials),
        "Tune, reused actors": lambda: plain_tune(alone, options.trials, True),
        "Tune": lambda: plain_tune(alone, min(10, options.trials), False),
        "ours, two workers": lambda: ours(2, options.pairs),
        "Tune and TorchTrainer": lambda: plain_tune(pair, options.pairs, True),
    }
    goals = [
        Goal("ours, one worker", "Tune", 10),
        Goal("ours, one worker", "Tune, reused actors"),
        Goal("ours, two workers", "Tune and TorchTrainer", 10),
    ]
    with cluster():
        figures = compare(measures, options.rounds)
        report("trials", figures, goals, before, "milliseconds per trial", more_is_better=False)
        if options.many:
            many(options.many)


if __name__ == "__main__":
    main()

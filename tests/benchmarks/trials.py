"""What a trial costs besides its training: ours against Ray Tune as it comes, on one worker and on two.

    python -m tests.benchmarks.trials [--rounds 3] [--trials 40] [--pairs 5] [--many 1000]

The trainable does nothing, one trial runs at a time, and the first one of a search, which starts the processes, is not
counted. Ours keeps every trial in a SQLite study and in MLflow; Tune keeps its own files alone. `--many` is the size of
one more search of ours, for its time and memory; 0 leaves it out.
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
from tests import toy
from tests.benchmarks.table import Goal, compare, machine, report

POLL = "0.5"
"""Seconds between Ray Train's looks at its workers, for both; its default, 2, is slower still."""


class Ends(tune.Callback):
    """When each trial ended, for Tune as a callback, and for ours as an `Observer`."""

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
        """From one end to the next, on average."""
        return 1e3 * (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def ours(workers, count):
    """Milliseconds a trial."""
    ends = Ends()
    content = {
        "name": "toy",
        "trainable": "tests.toy",
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
        plan = StudySetup("trial", "toy", toy.Data(), folder, Resources(concurrent=1), workers)
        runner.run(plan, study, tracker, tracker.start("parent", {}), ends)
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


def as_it_comes(function, count, reuse):
    """Milliseconds a trial of Tune's."""
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
    """Print what a long search takes."""
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
        "Tune, reused actors": lambda: as_it_comes(alone, options.trials, True),
        "Tune": lambda: as_it_comes(alone, min(10, options.trials), False),
        "ours, two workers": lambda: ours(2, options.pairs),
        "Tune and TorchTrainer": lambda: as_it_comes(pair, options.pairs, True),
    }
    goals = [
        Goal("ours, one worker", "Tune", 10),
        Goal("ours, one worker", "Tune, reused actors"),
        Goal("ours, two workers", "Tune and TorchTrainer", 10),
    ]
    with cluster():
        figures = compare(measures, options.rounds)
        report("trials", figures, goals, before, "milliseconds a trial", more_is_better=False)
        if options.many:
            many(options.many)


if __name__ == "__main__":
    main()

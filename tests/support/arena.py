"""Searches of the toy on Ray, with everything that `runner.run` takes."""

from collections import Counter
from dataclasses import replace

import pytest
import toy
from mlflow_tables import database

from grainmill.config.experiment import experiment_model
from grainmill.config.resources import Resources
from grainmill.execution import runner
from grainmill.execution.training_job import StudySetup
from grainmill.search.study import Study
from grainmill.tracking.mlflow_runs import Tracker


class Bench:
    """The folder of a run, with the tracker, the parent run and the observer that `runner.run` takes."""

    def __init__(self, folder, tracker, observer):
        self.folder, self.tracker, self.observer = folder, tracker, observer
        self.parent = tracker.start("parent", {})
        self.diary = folder / "diary"

    def setup(self, workers=1, **resources):
        data = toy.Data(diary=str(self.diary))
        return StudySetup("trial", "toy", data, str(self.folder), Resources(**resources), workers)

    def study(self, count, **changes):
        content = {"name": "toy", "trainable": "toy", "data": {}, "objective": {"score": "max"}, "space": HEIGHTS}
        checked = experiment_model(toy).model_validate({**content, **changes})
        return Study(f"sqlite:///{self.folder / 'study.db'}", "trial", checked, checked.first, count)

    def run(self, study, workers=1, **resources):
        runner.run(self.setup(workers, **resources), study, self.tracker, self.parent, self.observer)
        return study.records

    def computed(self):
        return self.diary.read_text().splitlines()

    def child_runs(self):
        children = self.tracker.client.search_runs(
            [self.tracker.experiment_id], f"tags.mlflow.parentRunId = '{self.parent}'"
        )
        return {run.info.run_name: run for run in children}


HEIGHTS = {"height": {"uniform": [0.0, 1.0]}}


class Arena(Bench):
    """A bench whose training processes report each step to an umpire."""

    def __init__(self, folder, umpire, observer):
        super().__init__(folder, Tracker(database(folder), "toy", folder), observer)
        self.umpire, self.data = umpire, {}

    def setup(self, workers=1, **resources):
        setup = super().setup(workers, **resources)
        data = setup.data.model_copy(update={**self.data, "umpire": self.umpire.port})
        return replace(setup, data=data)

    def grid(self, heights, **changes):
        """A grid search with a known result: the published height 0.5 first, then the given heights in order."""
        search = {"sampler": "grid", "scheduler": "none"}
        return self.study(1 + len(heights), space={"height": {"choice": heights}}, search=search, **changes)

    def all_runs(self):
        query = f"tags.mlflow.parentRunId = '{self.parent}'"
        return self.tracker.client.search_runs([self.tracker.experiment_id], query)

    def check(self, records, heights, repeated=(), steps=1):
        """Assert that all trials are complete with the metrics of an undisturbed search.

        Only the steps in `repeated`, such as `trial-0001 3`, may have been computed twice.
        """
        assert [(record.number, record.state) for record in records] == [(n, "complete") for n in range(len(records))]
        expected = [[(epoch, height * epoch / 4) for epoch in (1, 2, 3, 4)] for height in (0.5, *heights)]
        assert [[(row["epoch"], row["score"]) for row in record.history] for record in records] == expected
        names = [f"trial-{n:04d}" for n in range(len(records))]
        runs = self.all_runs()
        assert sorted((run.info.run_name, run.info.status) for run in runs) == [(name, "FINISHED") for name in names]
        ids = {run.info.run_name: run.info.run_id for run in runs}
        for name, rows in zip(names, expected, strict=True):
            history = self.tracker.client.get_metric_history(ids[name], "score")
            assert [(metric.step, metric.value) for metric in history] == rows
        computed = Counter(self.computed())
        assert computed.keys() == {f"{name} {step}" for name in names for step in range(1, 4 * steps + 1)}
        twice = {line: count for line, count in computed.items() if count > 1}
        assert twice.keys() <= set(repeated)
        assert all(count == 2 for count in twice.values())


@pytest.fixture
def arena(tmp_path, ray_cluster, umpire, observer):
    return Arena(tmp_path, umpire, observer)

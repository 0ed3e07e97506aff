"""tune() and train(): from an experiment to a registered model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from grainmill import catalog, registry, report, runs, search, trials
from grainmill.document import to_yaml
from grainmill.errors import SearchError
from grainmill.experiment import Experiment
from grainmill.search import Record, Study
from grainmill.tracking import Status, Tracker
from grainmill.worker import Plan


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    records: Sequence[Record]
    """The trials of the search; empty after `train`."""
    winner: Record | None
    """The best of them."""
    final: Record
    """The winner trained again, or the one training."""
    version: registry.Version
    report: Path


def tune(
    experiment: Experiment, tracking_uri: str, address: str | None, watch: trials.Watch, track: catalog.Track
) -> Outcome:
    """Search, train the winner again, register it as the champion, report.

    Cut short at any point, the same call carries on where it was.

    Args:
        experiment: what to run.
        tracking_uri: MLflow's.
        address: of a Ray cluster; None starts a local one for the time of the call.
        watch: is told of the progress.
        track: shows the progress of long loops.
    Raises:
        NameTakenError, BusyError, StorageError: see `runs.claim`.
        ResourceError: a trial does not fit into the cluster.
        TrackingError: MLflow does not answer.
        SearchError: no trial came through.
    """
    with _Run.begin(experiment, tracking_uri, track, watch, "run") as run, trials.cluster(address):
        settings = experiment.search
        watch.note(f"searching: {settings.trials} trials of up to {experiment.base.epochs} epochs")
        scheduler = search.build_scheduler(experiment)
        study = run.mill("trial", experiment.reference, settings.trials, experiment.resources.workers, scheduler)
        winner = _winner(study)
        watch.note(f"training the winner again, {_workers(experiment)}")
        return run.finish(winner, study.records)


def train(
    experiment: Experiment, tracking_uri: str, address: str | None, watch: trials.Watch, track: catalog.Track
) -> Outcome:
    """Train the base settings once, on `retrain_workers`, and register the result; as `tune` otherwise."""
    with _Run.begin(experiment, tracking_uri, track, watch, "train") as run, trials.cluster(address):
        watch.note(f"training {_workers(experiment)}")
        single = experiment.model_copy(update={"space": {}})
        return replace(run, experiment=single).finish(None, ())


def _workers(experiment: Experiment) -> str:
    count = experiment.resources.retrain_workers
    return f"on {count} workers" if count > 1 else "on one worker"


def _winner(study: Study) -> Record:
    best = study.best()
    if best is None:
        causes = {record.cause for record in study.records if record.cause}
        raise SearchError(
            f"a winner needs a trial that runs to its end, but none of {len(study.records)} did: "
            f"{'; '.join(sorted(causes)) or 'none reported a finite objective'}"
        )
    return best


@dataclass
class _Run:
    """One run of the mill: what its steps share."""

    experiment: Experiment
    trainable: catalog.Trainable
    data: Any
    folder: Path
    tracker: Tracker
    watch: trials.Watch
    parent: str

    @classmethod
    @contextmanager
    def begin(
        cls, experiment: Experiment, tracking_uri: str, track: catalog.Track, watch: trials.Watch, kind: str
    ) -> Iterator["_Run"]:
        """Claim the folder, write built-in data, open the parent MLflow run; the run ends in a final state."""
        storage = Path(experiment.storage).absolute()
        with runs.claim(experiment, kind) as folder:
            trainable = catalog.find(experiment.trainable)
            data = trainable.prepare(experiment.data, storage / "data", track)
            tracker = Tracker(tracking_uri, experiment.name, storage)
            parent = _parent(tracker, experiment, folder)
            status: Status = "FAILED"
            try:
                yield cls(experiment, trainable, data, folder, tracker, watch, parent)
                status = "FINISHED"
            except KeyboardInterrupt:
                status = "KILLED"
                raise
            finally:
                tracker.set_status(parent, status)

    def mill(self, name: str, first: Mapping[str, Any], count: int, workers: int, scheduler: TrialScheduler) -> Study:
        """Run the study `name`: `count` trials, the first with the setting `first`."""
        study = Study(self.folder / "study.db", name, self.experiment, first, count)
        plan = self._plan(name, workers)
        trials.run(plan, study, scheduler, self.tracker, self.parent, self.watch)
        return study

    def _plan(self, study: str, workers: int) -> Plan:
        module = str(self.trainable.__name__)  # type: ignore[attr-defined]  # a trainable is a module
        return Plan(study, module, self.data.model_dump(), self.folder, self.experiment.resources, workers)

    def finish(self, winner: Record | None, records: Sequence[Record]) -> Outcome:
        """Train the winner, or the base settings, on `retrain_workers`; register and report."""
        experiment, workers = self.experiment, self.experiment.resources.retrain_workers
        setting = winner.setting if winner else {}
        final = _winner(self.mill("final", setting, 1, workers, FIFOScheduler()))
        assert final.run_id, "a finished trial has a run"
        self.watch.note("registering the model")
        plan = self._plan("final", workers)
        version = registry.register(
            self.tracker,
            final.run_id,
            experiment.tracking.model or experiment.name,
            plan.trainable,
            plan.checkpoints(final.number),
            self.trainable.example(self.data),
            {name: f"{final.metrics[name]:.6f}" for name in experiment.objective},
        )
        self.tracker.log(self.parent, int(final.metrics["epoch"]), final.metrics)
        outcome = Outcome(records, winner, final, version, self.folder / "report.html")
        page = report.html(experiment, records or (final,), winner, final, version)
        outcome.report.write_text(page)
        self.tracker.attach(self.parent, "report.html", page)
        runs.finish(self.folder, {"version": version.uri, "parent_run": self.parent, "metrics": dict(final.metrics)})
        return outcome


def _parent(tracker: Tracker, experiment: Experiment, folder: Path) -> str:
    """The parent MLflow run: a new one, or that of the run that is carried on."""
    note = folder / "parent-run"
    if note.exists():
        run_id = note.read_text()
        tracker.set_status(run_id, "RUNNING")
        return run_id
    parameters = {f"objective.{name}": way for name, way in experiment.objective.items()}
    run_id = tracker.start(f"{experiment.name} {folder.name}", parameters, {})
    note.write_text(run_id)
    resolved = experiment.model_dump(mode="json", by_alias=True, exclude_none=True)
    tracker.attach(run_id, "experiment.yaml", to_yaml(resolved))
    return run_id

"""Search and training, from an experiment to a registered model."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grainmill import trainable as catalog
from grainmill.cluster import capacity
from grainmill.cluster.session import connect
from grainmill.config.experiment import Budget, Experiment, Search
from grainmill.config.resources import Workers
from grainmill.config.space import Setting
from grainmill.config.validation import COSTS
from grainmill.config.yaml_document import to_yaml
from grainmill.errors import SearchError, TrackingError
from grainmill.execution import runner
from grainmill.execution.training_job import StudySetup
from grainmill.execution.trial_callback import Observer
from grainmill.registry import models
from grainmill.registry.model_card import Interval, ModelCard
from grainmill.report import page as report
from grainmill.search import selection
from grainmill.search.asha import expected_epochs
from grainmill.search.records import TrialRecord
from grainmill.search.selection import Candidate
from grainmill.search.study import Study
from grainmill.storage import sqlite, workspace
from grainmill.storage.mirror import S3Files
from grainmill.storage.provenance import environment
from grainmill.tracking.mlflow_runs import PARENT, Tracker, check_reachable, translate_errors
from grainmill.workflows import run_folder

FOLDER = "grainmill.folder"
"""Tag of the parent run in MLflow: the folder of the run."""


@dataclass(frozen=True, repr=False)
class Outcome:
    """Result of a run."""

    experiment: Experiment
    records: Sequence[TrialRecord]
    """The trials of the search; empty after `train`."""
    candidates: Sequence[Candidate]
    """The best trials with their new trainings; after `train`, the base settings with theirs."""
    winner: Candidate
    """The candidate that was chosen."""
    final: TrialRecord
    """The training whose model is registered."""
    version: models.Version
    """The registered version."""
    champion: bool
    """True if users get the version already; False if it is a challenger of the present champion."""
    report: str
    """Path or S3 URL of the report."""
    tracking_uri: str
    """URI of the MLflow in which the version is registered."""

    def __repr__(self) -> str:
        alias = "champion" if self.champion else "challenger"
        values = ", ".join(f"{name} {self.winner.estimates.get(name)}" for name in self.experiment.objective)
        return f"Outcome({self.version.uri}, {alias}; {values}; {len(self.records)} trials; {self.report})"


def tune(
    experiment: Experiment, tracking_uri: str, address: str | None, observer: Observer, progress: catalog.Progress
) -> Outcome:
    """Search, train the winner again, register it, report.

    Called again after an interruption at any point, it carries on from there. `observer` receives the progress of the
    run, `progress` shows that of long loops. See `grainmill.api.tune` for the other arguments and for errors.
    """
    with _Run.begin(experiment, tracking_uri, progress, observer, "run") as run, connect(address):
        run.check_room("trial", experiment.resources.workers)
        run.check_room("final", experiment.resources.retrain_workers)  # before the search has cost anything
        observer.message(_forecast(experiment))
        study = run.study("trial", experiment, experiment.first, experiment.search.trials, experiment.resources.workers)
        best = selection.best(experiment, study.records)[: experiment.winner.candidates]
        if not best:
            raise SearchError(_no_winner(study))
        again = f"the best of them, each from {_count(experiment.winner.seeds, 'fresh seed')}"
        observer.message(
            f"training {_count(len(best), 'trial')} again, {again}" if len(best) > 1 else f"training {again}"
        )
        return run.finish(best, study)


def train(
    experiment: Experiment, tracking_uri: str, address: str | None, observer: Observer, progress: catalog.Progress
) -> Outcome:
    """Train the base settings once, on `retrain_workers`, and register the model; arguments and errors as in `tune`."""
    with _Run.begin(experiment, tracking_uri, progress, observer, "train") as run, connect(address):
        workers = experiment.resources.retrain_workers
        observer.message(f"training on {_range(workers)} worker{'' if workers == 1 else 's'}")
        return run.finish([None], None)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _range(workers: Workers) -> str:
    return f"{workers}" if isinstance(workers, int) else f"{workers[0]} to {workers[1]}"


def _forecast(experiment: Experiment) -> str:
    """Number of trials and epochs of a search, in words."""
    count, epochs = experiment.search.trials, experiment.base.epochs
    expected = expected_epochs(experiment)
    early = f", about {expected:.0f} with early stopping" if expected < count * epochs else ""
    again = experiment.winner.candidates * experiment.winner.seeds * epochs
    return (
        f"searching: {_count(count, 'trial')} of up to {epochs} epochs, {count * epochs} in all{early}; "
        f"then {again} to train the best again"
    )


def _no_winner(study: Study) -> str:
    causes = {record.cause for record in study.records if record.cause}
    return (
        f"a winner needs a trial that runs to its end, but none of {len(study.records)} did: "
        f"{'; '.join(sorted(causes)) or 'the budget was spent before'}"
    )


@dataclass
class _Run:
    """A run that has begun, with all that its steps share."""

    experiment: Experiment
    trainable: catalog.Trainable
    data: Any
    files: S3Files
    home: run_folder.Run
    tracker: Tracker
    observer: Observer
    parent: str

    @classmethod
    @contextmanager
    def begin(
        cls, experiment: Experiment, tracking_uri: str, progress: catalog.Progress, observer: Observer, kind: str
    ) -> Iterator["_Run"]:
        """Claim the folder, write built-in data and open the parent MLflow run, which always ends in a final state."""
        with run_folder.claim(experiment, kind, observer.message) as home:
            trainable = catalog.find(experiment.trainable)
            files = experiment.files
            for line in experiment.found():
                observer.message(line)
            data = _prepared(trainable, experiment, progress, files)
            tracker = Tracker(tracking_uri, experiment.name, experiment.storage)
            parent = _parent(tracker, experiment, home)
            try:
                yield cls(experiment, trainable, data, files, home, tracker, observer, parent)
            except BaseException as error:
                with suppress(TrackingError):  # the first error is the one to report
                    check_reachable(tracking_uri)
                    tracker.set_status(parent, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise

    def study(self, name: str, experiment: Experiment, first: Sequence[Setting], count: int, workers: Workers) -> Study:
        """Run `count` trials as the study `name`; the first trials have the settings `first`."""
        url, prefix = _database(experiment, self.home.folder, self.home.place)
        study = Study(url, prefix + name, experiment, first, count)
        study.keep = self.home.keep
        if experiment.search.warm_start is not None:
            home, _, run = workspace.absolute(experiment.search.warm_start).rpartition("/")
            with workspace.opened(home, run_folder.FOLDERS_OF_OTHERS) as earlier:
                url, prefix = _database(experiment, earlier.path / run, f"{home}/{run}")
                study.adopt(url, prefix + name)
        runner.run(self._setup(name, workers), study, self.tracker, self.parent, self.observer)
        return study

    def check_room(self, name: str, workers: Workers) -> None:
        """Refuse a study whose trials never fit into the cluster.

        Raises:
            ResourceError: the cluster is too small; the message says what is missing.
        """
        setup = self._setup(name, workers)
        capacity.trials_at_once(setup.need, setup.resources.concurrent, self.observer.message)

    def _setup(self, study: str, workers: Workers) -> StudySetup:
        module = str(self.trainable.__name__)  # type: ignore[attr-defined]  # a trainable is a module
        return StudySetup(study, module, self.data, self.home.place, self.experiment.resources, workers)

    def _run_ids(self) -> dict[str, str]:
        """Ids of the MLflow runs of the trials, by trial name."""
        return {name: run_id for run_id, (name, _) in self.tracker.runs_by_tag(PARENT, self.parent).items()}

    def finish(self, best: Sequence[TrialRecord | None], search: Study | None) -> Outcome:
        """Train the best trials again, or the base settings, on `retrain_workers`; choose, register and report."""
        experiment, workers = self.experiment, self.experiment.resources.retrain_workers
        settings: list[Setting] = [{}]
        if search:
            seeds = range(experiment.base.seed + 1, experiment.base.seed + 1 + experiment.winner.seeds)
            settings = [{**trial.setting, "seed": seed} for trial in best if trial for seed in seeds]
        single = experiment.model_copy(
            update={"space": {}, "search": Search(scheduler="none", trials=len(settings)), "budget": Budget()}
        )
        study = self.study("final", single, settings, len(settings), workers)
        found = selection.candidates(best, study.records)
        if not found:
            raise SearchError(_no_winner(study))
        chosen = selection.choose(experiment, found)
        final = selection.shipped(experiment, chosen)
        self.observer.message("registering the model")
        setup = self._setup("final", workers)
        run_id = self._run_ids()[setup.trial_name(final.number)]
        trained = setup.checkpoint_folder(final.number)
        with workspace.opened(trained) as kept, translate_errors(self.tracker.uri):
            version = models.register(
                self.tracker,
                run_id,
                experiment.tracking.model or experiment.name,
                kept.path,
                self.trainable.example(self.data, self.files),
                {name: f"{final.metrics[name]:.6f}" for name in experiment.objective},
                self._model_card(setup, chosen, final),
            )
            champion = models.is_champion(self.tracker.client, version)
        self.tracker.log(self.parent, int(final.metrics["epoch"]), final.metrics, final.times[-1])
        page, pictures = report.write(self.home.folder, experiment, search, study.records, found, chosen, version)
        self.tracker.attach(self.parent, "report.html", page.read_text())
        for picture in pictures:
            for owner in (self.parent, run_id):
                self.tracker.attach_file(owner, picture, "report")
        where = f"{self.home.place}/{page.name}"
        records = search.records if search else ()
        outcome = Outcome(experiment, records, found, chosen, final, version, champion, where, self.tracker.uri)
        done = {"version": version.uri, "parent_run": self.parent, "metrics": dict(final.metrics)}
        done["checkpoints"] = trained.removeprefix(f"{self.home.place}/")
        self.tracker.set_status(self.parent, "FINISHED")  # first, for a finished folder is not carried on
        run_folder.finish(self.home.folder, done)
        self.home.keep()
        return outcome

    def _model_card(self, setup: StudySetup, chosen: Candidate, final: TrialRecord) -> ModelCard:
        bundle = " ".join(f"{amount:g} {name}" for name, amount in setup.need.bundle.items())
        trial = f"trial-{chosen.trial.number:04d}" if chosen.trial else "none"
        places = {
            "search": workspace.uri(self.home.place),
            "search.run": self.parent,
            "trial": trial,
            "trial.run": self._run_ids().get(trial, "none"),
            "training": setup.trial_name(final.number),
            "epochs": f"{final.metrics['epoch']:.0f}",
            "seed": str(final.setting.get("seed", self.experiment.base.seed)),
        }
        return ModelCard(
            setup.trainable,
            _resolved(self.experiment),
            places,
            self.trainable.sources(self.data, self.files),
            environment(),
            {**final.hardware, "workers": f"{_range(setup.workers)} of {bundle}"},
            {name: final.cost[name] for name in COSTS if name in final.cost},
            {name: _interval(name, value, chosen) for name, value in final.metrics.items() if name != "epoch"},
        )


def _interval(name: str, value: float, chosen: Candidate) -> Interval:
    """A metric of the registered training, with the interval of the winner's mean if several trainings give one."""
    estimate = chosen.estimates.get(name)
    if estimate is None or not math.isfinite(estimate.half):
        return Interval(value)
    return Interval(value, estimate.low, estimate.high)


def _resolved(experiment: Experiment) -> str:
    return to_yaml(experiment.model_dump(mode="json", by_alias=True, exclude_none=True))


def _prepared(trainable: catalog.Trainable, experiment: Experiment, progress: catalog.Progress, files: S3Files) -> Any:
    """Data to train with; built-in images are written where all nodes see them."""
    storage = workspace.absolute(experiment.storage)
    # In S3 next to the runs of the name, since other names may belong to processes that write at the same time.
    place = f"{storage}/{experiment.name}/data" if workspace.is_remote(storage) else f"{storage}/data"
    with workspace.opened(place) as images:
        data = trainable.prepare(experiment.data, images.path, progress, files)
        images.upload()
        written = {
            name: place + value.removeprefix(str(images.path))
            for name, value in data
            if isinstance(value, str) and Path(value).is_relative_to(images.path)
        }
        return data.model_copy(update=written)


def _database(experiment: Experiment, folder: Path, place: str) -> tuple[str, str]:
    """URL of the database of a run, and prefix of the names of its studies."""
    if experiment.tracking.study is None:
        return sqlite.url_of(folder / "study.db"), ""
    return experiment.tracking.study, "/".join([*Path(place).absolute().parts[-2:], ""])


def _parent(tracker: Tracker, experiment: Experiment, home: run_folder.Run) -> str:
    """Id of the parent MLflow run: a new one, or the one of the run that is carried on."""
    note, folder = home.folder / "parent-run", workspace.uri(home.place)
    known = note.read_text() if note.exists() else ""
    if known and tracker.reopen(known):
        return known
    # Another server does not know the run: the study has all that its runs need.
    parameters = {f"objective.{name}": way for name, way in experiment.objective.items()}
    # A process that was killed before it wrote the note has left its MLflow run.
    left = next(iter(tracker.runs_by_tag(FOLDER, folder)), None)
    run_id = left or tracker.start(f"{experiment.name} {home.folder.name}", {FOLDER: folder})
    tracker.parameters(run_id, parameters)
    note.write_text(run_id)
    home.keep()
    tracker.attach(run_id, "experiment.yaml", _resolved(experiment))
    if experiment.findings is not None and experiment.findings.facts:
        found = {**experiment.findings.facts, "warnings": experiment.findings.warnings}
        tracker.attach(run_id, "data.json", json.dumps(found, indent=2))
    return run_id

"""The trials of a study on Ray Tune: resources, the trial itself, and the note-taking beside it."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune as ray_tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from grainmill import worker
from grainmill.errors import ResourceError
from grainmill.search import Record, Study, StudySearcher
from grainmill.tracking import Tracker
from grainmill.worker import Plan

OBJECT_STORE_BYTES = 256 * 2**20
"""Of a local Ray: trials pass metrics, not data."""
POLL_SECONDS = "0.5"
"""How often Ray Train takes up reports; a worker's report waits for it, two seconds by default."""
LEADER_BYTES = 256 * 2**20
"""Memory reserved for a trial that only leads a group: it takes no CPU from its workers."""


class Watch(Protocol):
    """Is told of the progress."""

    def note(self, message: str) -> None:
        """A step of the whole begins."""

    def trial(self, name: str, record: Record) -> None:
        """A trial began, finished an epoch, or ended."""


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Ray at an address, or a local one that ends with the block; one that is there already is used and left.

    A local Ray keeps its dashboard: Ray Train asks it which groups are still alive.
    """
    if ray.is_initialized():
        yield
        return
    environment = {"env_vars": {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL_SECONDS}}
    where: dict[str, Any] = {"address": address}
    if not address:
        where = {"address": "local", "include_dashboard": True, "object_store_memory": OBJECT_STORE_BYTES}
    on_termination = signal.getsignal(signal.SIGTERM)
    ray.init(**where, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    signal.signal(signal.SIGTERM, on_termination)  # Ray's own handler aborts the process where it stands
    try:
        yield
    finally:
        ray.shutdown()


def room(plan: Plan) -> int:
    """How many trials the cluster holds at once, as it is now.

    Raises:
        ResourceError: not one; names the resource that is missing.
    """
    total = ray.cluster_resources()
    fits = {name: int(total.get(name, 0) // (amount * plan.workers)) for name, amount in plan.bundle.items()}
    for name, count in fits.items():
        if count == 0:
            raise ResourceError(
                f"a trial needs {plan.bundle[name] * plan.workers:g} {name} ({plan.workers} x {plan.bundle[name]:g}), "
                f"but the cluster has {total.get(name, 0):g}; lower the workers or {name.lower()}s_per_worker, "
                "or set resources.concurrent if the cluster grows by itself"
            )
    return min(fits.values())


def run(plan: Plan, study: Study, scheduler: TrialScheduler, tracker: Tracker, parent: str, watch: Watch) -> None:
    """Run all trials of a study that are not in a final state.

    Args:
        plan: what they share.
        study: gives and keeps them.
        scheduler: stops some of them early.
        tracker: gets a run for each, below the run `parent`.
        parent: an MLflow run id.
        watch: is told of the progress.
    """
    searcher = StudySearcher(study)
    if not searcher.open_trials:
        return

    def trial(config: Mapping[str, Any]) -> None:
        worker.trial(plan, config)

    if plan.workers == 1:
        resources = ray_tune.PlacementGroupFactory([plan.bundle])
    else:
        resources = ray_tune.PlacementGroupFactory([{"memory": LEADER_BYTES}])
    observer = _Observer(plan, study, tracker, parent, watch)
    try:
        ray_tune.Tuner(
            ray_tune.with_resources(trial, resources),
            tune_config=ray_tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=searcher.open_trials,
                max_concurrent_trials=plan.resources.concurrent or room(plan),
                reuse_actors=True,  # a fresh process spends seconds on importing torch
                trial_dirname_creator=lambda trial: plan.name(trial.config["number"]),
            ),
            run_config=ray_tune.RunConfig(
                name=plan.study, storage_path=str(plan.folder / "ray"), verbose=0, callbacks=[observer]
            ),
        ).fit()
    finally:
        observer.end_unfinished()


class _Observer(ray_tune.Callback):  # type: ignore[misc]
    """Takes down in MLflow and in the study what Tune hears of its trials, and passes it on."""

    def __init__(self, plan: Plan, study: Study, tracker: Tracker, parent: str, watch: Watch) -> None:
        self.plan, self.study, self.tracker, self.parent, self.watch = plan, study, tracker, parent, watch
        self.open_runs: dict[int, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (ray_tune.Callback, ())  # Tune pickles its callbacks for a restore that we do not use

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        number = trial.config["number"]
        if number in self.open_runs:
            return
        run_id = self.study.record(number).run_id
        if run_id:
            self.tracker.set_status(run_id, "RUNNING")
        else:
            parameters = _flat(trial.config["spec"])
            run_id = self.tracker.start(self.plan.name(number), parameters, {"state": "running"}, self.parent)
            self.study.note(number, "run_id", run_id)
        self.open_runs[number] = run_id
        self._tell(number)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: Mapping[str, Any], **info: Any
    ) -> None:
        number = trial.config["number"]
        metrics = {name: float(result[name]) for name in result["reported"]}
        if self.study.report(number, metrics):
            self.tracker.log(self.open_runs[number], int(metrics["epoch"]), metrics)
            self._tell(number)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial.config["number"], failed=False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        number = trial.config["number"]
        self.study.note(number, "cause", _cause(trial))
        self._end(number, failed=True)

    def _end(self, number: int, failed: bool) -> None:
        state = self.study.close(number, failed)
        run_id = self.open_runs.pop(number)
        epochs = int(self.study.record(number).metrics.get("epoch", 0))
        self.tracker.tag(run_id, {"state": f"{state} at epoch {epochs}"})
        self.tracker.set_status(run_id, "FAILED" if state == "failed" else "FINISHED")
        self._tell(number)

    def end_unfinished(self) -> None:
        """Close the MLflow runs of trials that were interrupted; the trials themselves stay to be carried on."""
        for number in list(self.open_runs):
            self.tracker.set_status(self.open_runs.pop(number), "KILLED")

    def _tell(self, number: int) -> None:
        self.watch.trial(self.plan.name(number), self.study.record(number))


def _cause(trial: Trial) -> str:
    """The last line of a trial's traceback."""
    lines = Path(trial.error_file).read_text().split("\n") if trial.error_file else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "unknown")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat

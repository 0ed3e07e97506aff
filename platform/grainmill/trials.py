"""The trials of a study on Ray Tune."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune as ray_tune

from grainmill import leader
from grainmill.clerk import Clerk, Watch
from grainmill.errors import GrainmillError, ResourceError
from grainmill.halving import Halving
from grainmill.outbox import Outbox
from grainmill.search import Scheduler, StudySearcher
from grainmill.study import Study
from grainmill.tracking import Tracker
from grainmill.worker import Plan

OBJECT_STORE_BYTES = 256 * 2**20
"""Of a local Ray: trials pass metrics, not data."""
POLL_SECONDS = "0.5"
"""How often Ray Train takes up reports; a worker's report waits for it, two seconds by default."""
RESTARTS = 3
"""Times that a trial goes on after its process or node has died, before it fails."""
LEADER_BYTES = 256 * 2**20
"""Memory reserved for a trial that only leads a group: it takes no CPU from its workers."""


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


def run(plan: Plan, study: Study, tracker: Tracker, parent: str, watch: Watch) -> None:
    """Run all trials of a study that are not in a final state, until all are or the budget is spent.

    Args:
        plan: what they share.
        study: gives and keeps them.
        tracker: gets a run for each, below the run `parent`.
        parent: an MLflow run id.
        watch: is told of the progress.
    Raises:
        ResourceError: not even one fits into the cluster.
        SearchError: most of them fail.
        StorageError: the study's database does not answer any more.
        TrackingError: at the end, MLflow has not answered for a while.
    """
    halving = Halving(study.experiment, study.records)
    with Outbox(study, plan.name, tracker, parent, watch.note) as outbox:
        clerk = Clerk(plan, study, halving, outbox, watch)
        searcher = StudySearcher(study, halving, clerk.spent)
        if not searcher.finished:
            try:
                _tuner(plan, searcher, clerk, _at_once(plan, watch)).fit()
            except Exception as error:
                told = clerk.fatal or error.__cause__
                if isinstance(told, GrainmillError):
                    raise told from error
                raise
            finally:
                clerk.end_unfinished()
        clerk.close_paused()


def _at_once(plan: Plan, watch: Watch) -> int:
    """How many trials run at once; a cluster that is to grow for the first one is waited for, not in silence."""
    try:
        fits = room(plan)
    except ResourceError as error:
        if plan.resources.concurrent is None:
            raise
        watch.note(f"waiting for the cluster to grow: {error}")
        return plan.resources.concurrent
    return plan.resources.concurrent or fits


def _tuner(plan: Plan, searcher: StudySearcher, clerk: Clerk, at_once: int) -> ray_tune.Tuner:
    def trial(config: Mapping[str, Any]) -> None:
        leader.trial(plan, config)

    if plan.workers == 1:
        resources = ray_tune.PlacementGroupFactory([plan.bundle])
    else:
        resources = ray_tune.PlacementGroupFactory([{"memory": LEADER_BYTES}])
    return ray_tune.Tuner(
        ray_tune.with_resources(trial, resources),
        tune_config=ray_tune.TuneConfig(
            search_alg=searcher,
            scheduler=Scheduler(clerk.goes_on),
            num_samples=-1,  # until the searcher has no more
            max_concurrent_trials=at_once,
            reuse_actors=True,  # a fresh process spends seconds on importing torch
            trial_dirname_creator=lambda trial: f"{plan.name(trial.config['number'])}-{trial.trial_id}",
        ),
        run_config=ray_tune.RunConfig(
            name=plan.study,
            storage_path=plan.ray,
            verbose=0,
            callbacks=[clerk],
            failure_config=ray_tune.FailureConfig(max_failures=RESTARTS),
        ),
    )

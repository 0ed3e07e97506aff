"""The trials of a study on Ray Tune."""

import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import ray
from ray import tune as ray_tune
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address

from grainmill.cluster import capacity
from grainmill.errors import GrainmillError, ResourceError
from grainmill.execution import watchdog, worker_group
from grainmill.execution.searcher import Scheduler, StudySearcher
from grainmill.execution.training_job import Plan
from grainmill.execution.trial_callback import Clerk, Watch
from grainmill.search.asha import Halving
from grainmill.search.study import Study
from grainmill.tracking.mlflow_runs import Tracker
from grainmill.tracking.sync import Outbox

OBJECT_STORE_BYTES = 256 * 2**20
"""Of a local Ray: trials pass metrics, not data."""
POLL_SECONDS = "0.5"
"""How often Ray Train takes up reports; a worker's report waits for it, two seconds by default."""
HEAD_SECONDS = 10
"""Within which the head of a cluster must answer."""
RESTARTS = 3
"""Times that a trial goes on after its process or node has died, before it fails."""
LEADER_BYTES = 256 * 2**20
"""Memory reserved for a trial that only leads a group: it takes no CPU from its workers."""


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Ray at an address, or a local one that ends with the block; one that is there already is used and left.

    A local Ray keeps its dashboard: Ray Train asks it which groups are still alive.

    Raises:
        ResourceError: no cluster answers there, or it does not take this process: other versions, no token.
    """
    if ray.is_initialized():
        yield
        return
    if address and "://" not in address:
        _check_head(address)
    environment = {"env_vars": {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL_SECONDS}}
    where: dict[str, Any] = {"address": address}
    if not address:
        where = {"address": "local", "include_dashboard": True, "object_store_memory": OBJECT_STORE_BYTES}
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**where, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    except (ConnectionError, RuntimeError, ValueError) as error:
        ray.shutdown()
        raise ResourceError(_refusal(address, error)) from error
    signal.signal(signal.SIGTERM, on_termination)  # Ray's own handler aborts the process where it stands
    try:
        yield
    finally:
        ray.shutdown()


def _check_head(address: str) -> None:
    """Refuse an address where no head answers: Ray tries for minutes, and may end this process then."""
    with suppress(ValueError):  # no address at all; Ray says what is wrong with it
        if place := canonicalize_bootstrap_address(address):
            with init_grpc_channel(place) as channel:
                try:
                    grpc.channel_ready_future(channel).result(timeout=HEAD_SECONDS)
                except grpc.FutureTimeoutError:
                    raise ResourceError(
                        f"the head of a Ray cluster must answer at {place} within {HEAD_SECONDS} seconds, but did not; "
                        "is it running, and is this its own port (6379 by default), not that of its dashboard?"
                    ) from None


def _refusal(address: str | None, error: Exception) -> str:
    """Why Ray did not let us in, in words."""
    versions = re.findall(r"(?:Ray|Python): (\S+)", str(error))
    if "Version mismatch" in str(error) and len(versions) == 4:
        other_ray, other_python, our_ray, our_python = versions
        return (
            f"a cluster must have the versions of this command, Ray {our_ray} and Python {our_python}, but the one at "
            f"{address} has Ray {other_ray} and Python {other_python}; install those here, or these there"
        )
    return f"Ray must let this command in at {address or 'this machine'}, but said: {error}; correct --address"


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
        watched_by = watchdog.start()
        clerk = Clerk(plan, study, halving, outbox, watch, watchdog.Listener(watched_by))
        searcher = StudySearcher(study, halving, clerk.spent)
        if not searcher.finished:
            try:
                wave = capacity.at_once(plan, watch.note)
                _tuner(plan, searcher, clerk, wave, watched_by).fit()
            except Exception as error:
                told = clerk.fatal or error.__cause__
                if isinstance(told, GrainmillError):
                    raise told from error
                raise
            finally:
                clerk.end_unfinished()
                ray.kill(watched_by)  # else the node that it is on does not go before the driver ends
        clerk.close_paused()


def _tuner(plan: Plan, searcher: StudySearcher, clerk: Clerk, wave: int, watched_by: Any) -> ray_tune.Tuner:
    def trial(config: Mapping[str, Any]) -> None:
        worker_group.trial(plan, config, watched_by)

    if plan.need.most == 1:
        resources = ray_tune.PlacementGroupFactory([plan.need.bundle])
    else:
        # Beside this process, which is the last to be lost: a leader that dies takes its group with it.
        here = {"strategy": "STRICT_PACK", "_soft_target_node_id": ray.get_runtime_context().get_node_id()}
        resources = ray_tune.PlacementGroupFactory([{"memory": LEADER_BYTES}], **here)
    return ray_tune.Tuner(
        ray_tune.with_resources(trial, resources),
        tune_config=ray_tune.TuneConfig(
            search_alg=searcher,
            scheduler=Scheduler(clerk.goes_on),
            num_samples=-1,  # until the searcher has no more
            max_concurrent_trials=wave,  # Tune has so many wait for the cluster at a time, too: it grows at once
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

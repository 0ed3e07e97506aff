"""The trials of a study on Ray Tune."""

from collections.abc import Mapping
from typing import Any

import ray
from ray import tune as ray_tune

from grainmill.cluster import capacity
from grainmill.errors import GrainmillError
from grainmill.execution import watchdog, worker_group
from grainmill.execution.searcher import Scheduler, StudySearcher
from grainmill.execution.training_job import StudySetup
from grainmill.execution.trial_callback import Observer, TrialCallback
from grainmill.search.asha import ASHA
from grainmill.search.study import Study
from grainmill.tracking.mlflow_runs import Tracker
from grainmill.tracking.sync import MLflowSync

RESTARTS = 3
"""Times that a trial goes on after its process or node has died, before it fails."""
LEADER_BYTES = 256 * 2**20
"""Memory reserved for a trial that only leads a group: it takes no CPU from its workers."""


def run(plan: StudySetup, study: Study, tracker: Tracker, parent: str, observer: Observer) -> None:
    """Run all trials of a study that are not in a final state, until all are or the budget is spent.

    Args:
        plan: what they share.
        study: gives and keeps them.
        tracker: gets a run for each, below the run `parent`.
        parent: an MLflow run id.
        observer: is told of the progress.
    Raises:
        ResourceError: not even one fits into the cluster.
        SearchError: most of them fail.
        StorageError: the study's database does not answer any more.
        TrackingError: at the end, MLflow has not answered for a while.
    """
    asha = ASHA(study.experiment, study.records)
    with MLflowSync(study, plan.name, tracker, parent, observer.message) as mlflow_sync:
        watched_by = watchdog.start()
        clerk = TrialCallback(plan, study, asha, mlflow_sync, observer, watchdog.WatchdogMessages(watched_by))
        searcher = StudySearcher(study, asha, clerk.spent)
        if not searcher.finished:
            try:
                wave = capacity.trials_at_once(plan.need, plan.resources.concurrent, observer.message)
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


def _tuner(
    plan: StudySetup, searcher: StudySearcher, clerk: TrialCallback, wave: int, watched_by: Any
) -> ray_tune.Tuner:
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

"""Run of a study: its trials on Ray Tune, the watchdog over them, and their records in MLflow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune as ray_tune

from grainmill.cluster import capacity, ray_private
from grainmill.errors import GrainmillError
from grainmill.execution import watchdog
from grainmill.execution.searcher import Scheduler, StudySearcher
from grainmill.execution.training_job import StudySetup
from grainmill.execution.trial import run_trial
from grainmill.execution.trial_callback import Observer, TrialCallback
from grainmill.search.asha import ASHA
from grainmill.search.study import Study
from grainmill.storage import workspace
from grainmill.tracking.mlflow_runs import Tracker
from grainmill.tracking.sync import MLflowSync

RESTARTS = 3
"""Restarts of a trial whose process or node has died, before the trial fails."""
DRIVER_BYTES = 256 * 2**20
"""Memory reserved for a trial that leads a worker group; it reserves no CPU."""


def run(setup: StudySetup, study: Study, tracker: Tracker, parent: str, observer: Observer) -> None:
    """Run the study's trials until all are in a final state, or the budget is spent.

    Each trial gets an MLflow run below the run with the id `parent`.

    Raises:
        ResourceError: not even one trial fits into the cluster.
        SearchError: most of the trials fail.
        StorageError: the study's database no longer answers.
        TrackingError: at the end, MLflow has not answered for a while.
    """
    asha = ASHA(study.experiment, study.records)
    with MLflowSync(study, setup.trial_name, tracker, parent, observer.message) as mlflow_sync:
        dog = watchdog.start()
        callback = TrialCallback(setup, study, asha, mlflow_sync, observer, watchdog.WatchdogMessages(dog))
        searcher = StudySearcher(study, asha, callback.spent)
        if not searcher.finished:
            try:
                at_once = capacity.trials_at_once(setup.need, setup.resources.concurrent, observer.message)
                with workspace.temporary_folder() as folder:
                    _tuner(setup, searcher, callback, at_once, dog, folder).fit()
            except Exception as error:
                reason = callback.fatal_error or error.__cause__
                if isinstance(reason, GrainmillError):
                    raise reason from error
                raise
            finally:
                callback.end_unfinished()
                ray.kill(dog)  # otherwise its node is not removed before the driver ends
        callback.close_paused()


def _tuner(
    setup: StudySetup, searcher: StudySearcher, callback: TrialCallback, at_once: int, dog: Any, folder: Path
) -> ray_tune.Tuner:
    def trial(config: Mapping[str, Any]) -> None:
        run_trial(setup, config, dog)

    if setup.need.most == 1:
        resources = ray_tune.PlacementGroupFactory([setup.need.bundle])
    else:
        # Beside this process, whose node is the last to be lost: a trial that dies takes its worker group with it.
        resources = ray_tune.PlacementGroupFactory([{"memory": DRIVER_BYTES}], **ray_private.near_this_node())
    return ray_tune.Tuner(
        ray_tune.with_resources(trial, resources),
        tune_config=ray_tune.TuneConfig(
            search_alg=searcher,
            scheduler=Scheduler(callback.receive),
            num_samples=-1,  # until the searcher has finished
            max_concurrent_trials=at_once,  # also the number of pending trials, so that the cluster grows at once
            reuse_actors=True,  # a new process spends seconds on importing torch
            trial_dirname_creator=lambda trial: f"{setup.trial_name(trial.config['number'])}-{trial.trial_id}",
        ),
        run_config=ray_tune.RunConfig(
            name=setup.study,
            storage_path=str(folder),  # a copy of what the study has, which nobody reads
            verbose=0,
            callbacks=[callback],
            failure_config=ray_tune.FailureConfig(max_failures=RESTARTS),
        ),
    )

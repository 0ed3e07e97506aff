"""Promotion lock: one process at a time, on any machine, changes the aliases of a registered model.

MLflow has no compare-and-set, but of several processes that create an experiment of the same name only one succeeds.
So the lock on a model is an experiment whose name ends with a number. The lock is held while the experiment exists and
released by deleting it. MLflow keeps the names of deleted experiments, so the next lock has the next number. The lock
of a process that died is taken over by creating the next one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, ViewType
from mlflow.exceptions import MlflowException

from grainmill.errors import PromotionError
from grainmill.tracking.mlflow_runs import all_pages

EXPIRES_SECONDS = 60
"""Age of a lock at which its holder counts as dead; the work under a lock takes a few calls of MLflow."""
POLL_SECONDS = 0.2
EXPERIMENT_PREFIX = "grainmill promotion of "


class _Experiment(NamedTuple):
    number: int
    id: str
    active: bool


class PromotionLock:
    """The exclusive right to change the aliases of a registered model."""

    def __init__(self, client: MlflowClient, model: str, number: int) -> None:
        self.client, self.model, self.number = client, model, number
        self._until = time.monotonic() + EXPIRES_SECONDS / 2

    def check(self) -> None:
        """Make sure that no other process has taken over the lock.

        Raises:
            PromotionError: the promotion took too long.
        """
        if time.monotonic() > self._until or _newest(self.client, self.model).number != self.number:
            raise PromotionError(
                f"a promotion must be done within {EXPIRES_SECONDS // 2} seconds, but that of {self.model} took "
                "longer, and another may have begun; nothing was changed, try again"
            )


@contextmanager
def hold(client: MlflowClient, model: str, note: Callable[[str], None]) -> Iterator[PromotionLock]:
    """Hold the lock on the registered model named `model`.

    `note` receives a message if another process must be waited for.
    """
    number, experiment = _acquire(client, model, note)
    try:
        yield PromotionLock(client, model, number)
    finally:
        client.delete_experiment(experiment)


def _acquire(client: MlflowClient, model: str, note: Callable[[str], None]) -> tuple[int, str]:
    """Create the experiment with the next number; returns the number and the experiment's id."""
    last, since = None, time.monotonic()
    while True:
        newest = _newest(client, model)
        if newest.active:
            if newest != last:
                note(f"another promotion of {model} is under way; waiting for it, {EXPIRES_SECONDS} seconds at most")
                last, since = newest, time.monotonic()  # by this clock alone: others may be wrong
            if time.monotonic() - since < EXPIRES_SECONDS:
                time.sleep(POLL_SECONDS)
                continue
        try:
            made = client.create_experiment(f"{EXPERIMENT_PREFIX}{model} {newest.number + 1:06d}")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            continue  # another process was faster
        if newest.active:
            with suppress(MlflowException):  # its holder was not dead after all, and has just released the lock
                client.delete_experiment(newest.id)
        return newest.number + 1, str(made)


def _newest(client: MlflowClient, model: str) -> _Experiment:
    """Find the lock of a model with the highest number; number 0 if there has been none."""
    query = f"name LIKE '{EXPERIMENT_PREFIX}%'"
    found = [_Experiment(0, "", False)]
    for one in all_pages(lambda token: client.search_experiments(ViewType.ALL, filter_string=query, page_token=token)):
        number = one.name.removeprefix(f"{EXPERIMENT_PREFIX}{model} ")
        if number.isdecimal():
            found.append(_Experiment(int(number), one.experiment_id, one.lifecycle_stage == LifecycleStage.ACTIVE))
    return max(found)

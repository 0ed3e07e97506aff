"""One process at a time changes who is the champion, whatever machine it is on.

MLflow compares and sets nothing in one step, but of several that make an experiment of one name, one does. So the
lease on a model is an experiment whose name ends with a number: it is held while it is there, and given back by
deleting it; MLflow keeps the name of a deleted one, so the next lease has the next number. What a dead process holds
is taken over by making the next one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, ViewType
from mlflow.exceptions import MlflowException

from grainmill.errors import PromotionError

EXPIRES_SECONDS = 60
"""After which nobody is believed to hold a lease any more; what is done under one takes a few calls."""
POLL_SECONDS = 0.2
EXPERIMENT_PREFIX = "grainmill promotion of "


class _LockState(NamedTuple):
    number: int
    id: str
    active: bool


class PromotionLock:
    """The right to change the aliases of a registered model."""

    def __init__(self, client: MlflowClient, model: str, number: int) -> None:
        self.client, self.model, self.number = client, model, number
        self._until = time.monotonic() + EXPIRES_SECONDS / 2

    def check(self) -> None:
        """Make sure that nobody has taken it over.

        Raises:
            PromotionError: it took too long.
        """
        if time.monotonic() > self._until or _newest(self.client, self.model).number != self.number:
            raise PromotionError(
                f"a promotion must be done within {EXPIRES_SECONDS // 2} seconds, but that of {self.model} took "
                "longer, and another may have begun; nothing was changed, try again"
            )


@contextmanager
def hold(client: MlflowClient, model: str, note: Callable[[str], None]) -> Iterator[PromotionLock]:
    """The lease on a model, for the time of the block.

    Args:
        client: of MLflow.
        model: name of the registered model.
        note: is told if another process must be waited for.
    """
    number, experiment = _take(client, model, note)
    try:
        yield PromotionLock(client, model, number)
    finally:
        client.delete_experiment(experiment)


def _take(client: MlflowClient, model: str, note: Callable[[str], None]) -> tuple[int, str]:
    seen, since = None, time.monotonic()
    while True:
        newest = _newest(client, model)
        if newest.active:
            if newest != seen:
                note(f"another promotion of {model} is under way; waiting for it, {EXPIRES_SECONDS} seconds at most")
                seen, since = newest, time.monotonic()  # by this clock alone: others may be wrong
            if time.monotonic() - since < EXPIRES_SECONDS:
                time.sleep(POLL_SECONDS)
                continue
        try:
            made = client.create_experiment(f"{_prefix(model)}{newest.number + 1:06d}")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            continue  # another process was faster
        if newest.active:
            with suppress(MlflowException):  # its holder was not dead after all, and has just given it back
                client.delete_experiment(newest.id)
        return newest.number + 1, str(made)


def _prefix(model: str) -> str:
    return f"{EXPERIMENT_PREFIX}{model} "


def _newest(client: MlflowClient, model: str) -> _LockState:
    """The lease with the highest number; 0 before the first."""
    found = [_LockState(0, "", False)]
    token: str | None = None
    while token != "":
        page = client.search_experiments(
            ViewType.ALL, filter_string=f"name LIKE '{EXPERIMENT_PREFIX}%'", page_token=token
        )
        for one in page:
            rest = one.name.removeprefix(_prefix(model))
            if rest.isdecimal():
                found.append(_LockState(int(rest), one.experiment_id, one.lifecycle_stage == LifecycleStage.ACTIVE))
        token = page.token or ""
    return max(found)

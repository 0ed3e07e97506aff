"""Functions that a caller passes to long-running work: to show its progress, and to stop it."""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Wraps the items of a long loop to show its progress, given a title and the number of items."""

    def __call__(self, items: Iterable[Item], title: str, length: int) -> Iterable[Item]: ...


def no_progress(items: Iterable[Item], title: str, length: int) -> Iterable[Item]:  # noqa: ARG001
    """Return the items as they are: the `Progress` that shows nothing."""
    return items


Heartbeat = Callable[[], bool]
"""Called by a training after each step, and between the batches of an evaluation.

It returns True, from then on always, when the caller must save a checkpoint at once and end.
"""


def no_heartbeat() -> bool:
    """Return False: the `Heartbeat` of a training that nothing watches."""
    return False


class EndedError(Exception):
    """An evaluation was cut short on all ranks, because the heartbeat of one rank returned True."""

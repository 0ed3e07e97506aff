"""Functions that a caller hands to long work: one shows its progress, one is told that it is alive."""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Track(Protocol):
    """Wraps a long loop, given a title and a length, to show its progress."""

    def __call__(self, items: Iterable[Item], title: str, length: int) -> Iterable[Item]: ...


def untracked(items: Iterable[Item], title: str, length: int) -> Iterable[Item]:  # noqa: ARG001
    """The `Track` that shows nothing."""
    return items


Beat = Callable[[], bool]
"""Called after each step, and between the batches of an evaluation.

True, and it stays so: save a checkpoint at once, and end.
"""


def undisturbed() -> bool:
    """The `Beat` of a training that nobody watches."""
    return False


class EndedError(Exception):
    """An evaluation was cut short on all ranks, because a beat of one of them said so."""

"""What a training calls after each step: it says that it is alive, and hears whether to end."""

from collections.abc import Callable

Beat = Callable[[], bool]
"""Called after each step, and between the batches of an evaluation.

True, and it stays so: save a checkpoint at once, and end.
"""


def undisturbed() -> bool:
    """The `Beat` of a training that nobody watches."""
    return False


class EndedError(Exception):
    """An evaluation was cut short on all ranks, because a beat of one of them said so."""

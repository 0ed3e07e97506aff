"""Work that the ranks of a process group share; without a group, this process does all of it.

Where one rank raises, the others lose their connection to it as they wait for its part.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import distributed

Item = TypeVar("Item")


def place() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def dealt(work: Callable[[slice], Sequence[Item]]) -> list[Item]:
    """What all ranks make of their shares of a list, in its order; the same on each.

    Args:
        work: from the part of the list that this rank gets, which may be empty, to as many results.
    """
    rank, world = place()
    mine = list(work(slice(rank, None, world)))
    if not distributed.is_initialized():
        return mine
    shares = [mine] * world
    distributed.all_gather_object(shares, mine)
    whole = [item for share in shares for item in share]
    for index, share in enumerate(shares):
        whole[index::world] = share
    return whole


def first(work: Callable[[], Item]) -> Item:
    """What rank 0 makes alone, on every rank."""
    rank, _ = place()
    found: list[Any] = [work() if rank == 0 else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(found, src=0)
    return found[0]

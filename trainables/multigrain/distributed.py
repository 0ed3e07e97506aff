"""Work that the ranks of a process group share; without a group, this process does all of it.

Where one rank raises, the others lose their connection to it as they wait for its part.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from multigrain.hooks import Heartbeat

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


class Ending:
    """When all ranks end: what one of them is told after a step is known to all after the next.

    They ask each other while that step runs, so that nobody waits for an answer.
    """

    def __init__(self, heartbeat: Heartbeat, device: torch.device) -> None:
        self.heartbeat, self.device = heartbeat, device
        # Not the stream of the steps: to read the answer would be to wait for the step that runs.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._asked: tuple[Tensor, distributed.Work] | None = None

    def after_step(self) -> bool:
        """Whether to end now; every rank must call it after each step."""
        told, ends = self.heartbeat(), False
        if not distributed.is_initialized():
            return told
        with torch.cuda.stream(self._stream):
            if self._asked:
                flag, work = self._asked
                work.wait()
                ends = bool(flag.item())
            flag = torch.full((1,), float(told), device=self.device)
            self._asked = flag, distributed.all_reduce(flag, distributed.ReduceOp.MAX, async_op=True)
        return ends

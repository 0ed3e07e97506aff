"""Work shared by the ranks of a process group; without a group, this process does all of it.

If one rank raises an error, the others lose their connection to it while they wait for its share.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from multigrain.hooks import Heartbeat

Item = TypeVar("Item")


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Average a tensor over all ranks; no gradient flows back."""
    x = x.detach().clone()
    if distributed.is_initialized():
        distributed.all_reduce(x)
    return x / rank_and_size()[1]


def share_work(work: Callable[[slice], Sequence[Item]]) -> list[Item]:
    """Let each rank compute its share of a list, and return the whole list, in order, on every rank.

    Args:
        work: computes the results of a slice of the list, one for each item; the slice may be empty.
    """
    rank, size = rank_and_size()
    mine = list(work(slice(rank, None, size)))
    if not distributed.is_initialized():
        return mine
    shares = [mine] * size
    distributed.all_gather_object(shares, mine)
    whole = [item for share in shares for item in share]
    for index, share in enumerate(shares):
        whole[index::size] = share
    return whole


def on_rank_zero(work: Callable[[], Item]) -> Item:
    """Do some work on rank 0 alone, and return its result on every rank."""
    rank, _ = rank_and_size()
    result: list[Any] = [work() if rank == 0 else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(result, src=0)
    return result[0]


class StopSignal:
    """Lets all ranks stop after the same step: one step after the heartbeat of any rank asked to stop.

    The ranks exchange their answers while the next step runs, so that no step waits for them.
    """

    def __init__(self, heartbeat: Heartbeat, device: torch.device) -> None:
        self.heartbeat, self.device = heartbeat, device
        # A stream of its own: reading the answer on the stream of the steps would wait for the step that runs.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pending: tuple[Tensor, distributed.Work] | None = None

    def after_step(self) -> bool:
        """Return True when training must stop now; every rank must call this after each step."""
        asked, stops = self.heartbeat(), False
        if not distributed.is_initialized():
            return asked
        with torch.cuda.stream(self._stream):
            if self._pending:
                flag, exchange = self._pending
                exchange.wait()
                stops = bool(flag.item())
            flag = torch.full((1,), float(asked), device=self.device)
            self._pending = flag, distributed.all_reduce(flag, distributed.ReduceOp.MAX, async_op=True)
        return stops

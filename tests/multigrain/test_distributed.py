"""Work that ranks share: each item is done once, by one rank, and every rank gets all in order."""

from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ranks import start_ranks
from torch import distributed

from multigrain import distributed as group
from multigrain.retrieval import ranking
from multigrain.retrieval.metrics import Truth


def ranks_of(queries, share):
    """Ranks among four items, two of which every query should find."""
    truth = [Truth(np.array([0, 2]), np.array([1]))] * len(queries)
    return ranking.ranks(queries[share], np.eye(4, dtype="f4"), truth[share])


def test_alone_a_process_does_everything():
    assert group.rank_and_size() == (0, 1)
    assert group.share_work(lambda share: [x * x for x in range(5)[share]]) == [0, 1, 4, 9, 16]
    assert group.on_rank_zero(lambda: "made") == "made"
    assert group.mean_over_ranks(torch.tensor(3.5)) == 3.5


def of_one_rank(rank, meeting):
    torch.set_num_threads(1)
    # A rank that waits for ever fails instead.
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    shares, calls = [], []
    squares = [
        group.share_work(lambda share, count=count: shares.append(range(count)[share]) or [x * x for x in shares[-1]])
        for count in (5, 2, 1, 0)
    ]
    made = group.on_rank_zero(lambda: calls.append(rank) or {"from": rank})
    found = [group.share_work(partial(ranks_of, rows)) for rows in np.split(np.eye(4, dtype="f4"), [3])]
    torch.save([group.rank_and_size(), squares, shares, made, calls, found], Path(meeting) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_share_the_work_and_have_the_whole(tmp_path):
    start_ranks(of_one_rank, (str(tmp_path),))
    expected = [[0, 1, 4, 9, 16], [0, 1], [0], []]
    for rank in range(2):
        place, squares, shares, made, calls, found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert place == (rank, 2)
        assert squares == expected
        assert [list(share) for share in shares] == [[[0, 2, 4], [0], [0], []], [[1, 3], [1], [], []]][rank]
        assert made == {"from": 0}
        assert calls == [0][rank:]
        # Of three and of one query: its own item first, if that is a positive, and the other behind all that ties.
        assert [[one.tolist() for one in some] for some in found] == [[[0, 2], [1, 2], [0, 2]], [[1, 2]]]

"""Groups of processes that train or evaluate together, as `torchrun` starts them."""

from torch import multiprocessing


def start_ranks(function, arguments, count=2):
    """Call `function(rank, *arguments)` in `count` processes, and wait for them.

    They are forked from a server process that has imported torch and pytest once and computed nothing.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["multigrain.training.fit", "pytest"])
    multiprocessing.start_processes(function, arguments, nprocs=count, start_method="forkserver")

"""Time of triplet sampling: ours against a loop over anchors, pytorch-metric-learning's miner, and a lower bound.

    python -m tests.benchmarks.sampler [--device cuda] [--rounds 5]

Groups of three views, 2,048 channels; all contestants end with the three gathered sets of descriptors.
"""

import argparse
import time
from functools import partial

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from multigrain.losses.triplets import sample_triplets
from tests.benchmarks.table import Goal, compare, machine, report

CHANNELS, COPIES = 2048, 3


def batch(images, device):
    """Descriptors and instance ids: copies lie about 0.4 apart, different images about 1.2."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(images, CHANNELS, generator=generator) ** 4
    views = centres.repeat_interleave(COPIES, 0) + 0.1 * torch.rand(images * COPIES, CHANNELS, generator=generator)
    return (views / views.norm(dim=1, keepdim=True)).to(device), torch.arange(images).repeat_interleave(COPIES)


def loop(descriptors, ids):
    """The usual algorithm: weights are copied to the CPU, which draws the negatives anchor by anchor."""
    squares = descriptors.square().sum(dim=1)
    squared = squares[:, None] + squares[None] - 2 * descriptors @ descriptors.T
    distances = (squared.clamp(min=0) + torch.eye(len(descriptors), device=descriptors.device)).sqrt().clamp(min=0.5)
    logs = (2 - CHANNELS) * distances.log() - (CHANNELS - 3) / 2 * (1 - 0.25 * distances.square()).log()
    different = (ids[:, None] != ids[None]).to(descriptors.device)
    weights = (logs - logs.max()).exp() * different * (distances < 1.4)
    weights, different, names = (
        (weights / weights.sum(1, keepdim=True)).cpu().numpy(),
        different.cpu().numpy(),
        ids.numpy(),
    )
    anchors, positives, negatives = [], [], []
    for i, row in enumerate(weights):
        copies = [j for j in np.flatnonzero(names == names[i]) if j != i]
        chances = different[i] / different[i].sum() if np.isnan(row).any() else row / row.sum()
        anchors += [i] * len(copies)
        positives += copies
        replace = bool((chances > 0).sum() < len(copies))
        negatives += np.random.choice(len(row), len(copies), replace=replace, p=chances).tolist()
    return descriptors[anchors], descriptors[positives], descriptors[negatives]


def ours(descriptors, ids):
    return tuple(descriptors[indices] for indices in sample_triplets(descriptors, ids))


def floor(descriptors, ids):
    """The lower bound: the matrix of cosines and the three gathered sets, which every sampler computes."""
    descriptors @ descriptors.T
    indices = torch.arange(len(ids), device=descriptors.device).repeat_interleave(COPIES - 1)
    return tuple(descriptors[indices] for _ in range(3))


def miner():
    """The distance-weighted miner of pytorch-metric-learning, if it is installed."""
    try:
        from pytorch_metric_learning.miners import DistanceWeightedMiner
    except ModuleNotFoundError:
        return None
    mine = DistanceWeightedMiner()

    def run(descriptors, ids):
        return tuple(descriptors[indices] for indices in mine(descriptors, ids.to(descriptors.device)))

    return run


def waits(descriptors, ids):
    """Number of times that `ours` makes the CPU wait for the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        ours(descriptors, ids)
    return sum("Synchronize" in event.name for event in record.events())


def milliseconds(run, descriptors, ids, calls=3):
    """Milliseconds of one call, the best of a few."""
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        run(descriptors, ids)
        if descriptors.is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    before, figures, goals = machine(), {}, []
    against_loop = 50 if options.device != "cpu" else None
    for images, on_cpu, against_miner in ((42, 3, 10), (170, 3, 21), (682, 2.3, 80), (1365, 2.3, None)):
        descriptors, ids = batch(images, options.device)
        size = len(ids)
        contestants = {"loop": loop, "ours": ours, "floor": floor} | ({"miner": miner()} if miner() else {})
        if against_miner is None:
            contestants.pop("miner", None)  # it takes minutes
        names = {name: f"{name}, {size} views" for name in contestants}
        runs = {names[name]: partial(milliseconds, run, descriptors, ids) for name, run in contestants.items()}
        figures |= compare(runs, options.rounds)
        goals.append(Goal(names["ours"], names["loop"], against_loop or on_cpu))
        goals += [Goal(names["ours"], names["miner"], against_miner)] if "miner" in names else []
        goals += [Goal(names["ours"], names["floor"], 1 / 1.5), Goal(names["floor"], names["loop"])]
    report("sampler", figures, goals, before, "milliseconds", more_is_better=False)
    if options.device != "cpu":
        print("times that a call of ours waits for the device:", waits(*batch(170, options.device)))


if __name__ == "__main__":
    main()

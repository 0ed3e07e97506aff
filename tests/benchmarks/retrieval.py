"""Exact mAP of 1,000 queries among 10,000 items: ours against a loop, sorting, and the product alone.

    python -m tests.benchmarks.retrieval [--rounds 5] [--large]

2,048 channels, about five positives a query. --large: 60,000 items of 512 channels searched among each other, with
the memory of a process of its own, and pytorch-metric-learning's accuracy calculator where it is installed.
"""

import argparse
import multiprocessing
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from multigrain.retrieval import MEASURES, Truth, average_precision, same_label
from multigrain.search import mean_average_precision, ranks
from tests.benchmarks.table import Goal, compare, machine, report

QUERIES, ITEMS, CHANNELS = 1000, 10_000, 2048


def descriptors(labels, channels, seed):
    """Of unit norm, not negative, as after a ReLU; more like those of their own label than like others."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).random((labels.max() + 1, channels), dtype=np.float32) ** 4
    rows = centres[labels] + 2.5 * rng.random((len(labels), channels), dtype=np.float32) ** 4
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@cache
def problem():
    """Queries and items of twice as many objects as there are queries, in any order, and the truth."""
    objects = np.random.default_rng(1).permutation(ITEMS) % (2 * QUERIES)
    truth = [Truth(np.flatnonzero(objects == query), np.empty(0, np.int64)) for query in range(QUERIES)]
    return descriptors(np.arange(2 * QUERIES), CHANNELS, 2)[:QUERIES], descriptors(objects, CHANNELS, 3), truth


def loop(queries, database, truth):
    """The usual evaluation: the distances of one query at a time, sorted."""
    found = []
    for query, (positives, _) in zip(queries, truth, strict=True):
        order = np.argsort(np.linalg.norm(database - query, axis=1))
        found.append(average_precision(np.flatnonzero(np.isin(order, positives))))
    return np.mean(found)


def argsort(queries, database, truth):
    """One product in fp32, and every query's scores sorted."""
    orders = np.argsort(-(torch.from_numpy(queries) @ torch.from_numpy(database).T).numpy(), axis=1)
    found = [
        average_precision(np.flatnonzero(np.isin(order, positives)))
        for order, (positives, _) in zip(orders, truth, strict=True)
    ]
    return np.mean(found)


def product(queries, database, truth):
    """What no exact evaluation can do without."""
    torch.from_numpy(queries) @ torch.from_numpy(database).T


def seconds(run):
    started = time.perf_counter()
    run(*problem())
    return time.perf_counter() - started


def _among_each_other(pipe):
    """Sends seconds, the growth of the largest resident memory in MB, and recall@1 of 60,000 items."""
    labels = np.random.default_rng(0).permutation(60_000) % 11_316
    items, truth = descriptors(labels, 512, 1), same_label(labels)
    ranks(items[:10], items[:10], [Truth(np.arange(1), np.empty(0, np.int64))] * 10)  # loads what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far is forgotten
    before = _resident("VmRSS")
    started = time.perf_counter()
    found = ranks(items, items, truth)
    pipe.send((time.perf_counter() - started, _resident("VmHWM") - before, MEASURES["recall@1"].values(found).mean()))


def _resident(name):
    """A figure of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e3


def _calculator(pipe):
    """`_among_each_other` by pytorch-metric-learning, whose measures stop at the R nearest."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    labels = np.random.default_rng(0).permutation(60_000) % 11_316
    items = torch.from_numpy(descriptors(labels, 512, 1))
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), device=torch.device("cpu")
    )
    before, started = _resident("VmRSS"), time.perf_counter()
    found = calculator.get_accuracy(items, torch.from_numpy(labels))
    pipe.send((time.perf_counter() - started, _resident("VmHWM") - before, found["precision_at_1"]))


def in_a_process(work):
    """What `work` sends from a process of its own; None if it cannot."""
    here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=work, args=(there,))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return None
    finally:
        process.join()


def large():
    for name, work in (("ours", _among_each_other), ("pytorch-metric-learning", _calculator)):
        outcome = in_a_process(work)
        if outcome is None:
            print(f"60,000 among each other, {name}: not measured")
            continue
        goals = " (goals 60 s, 1,000 MB)" if name == "ours" else ""
        print("60,000 among each other, {}: {:.1f} s, {:.0f} MB more, recall@1 {:.4f}{}".format(name, *outcome, goals))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    before = machine()
    contestants = {"loop": loop, "argsort": argsort, "ours": mean_average_precision, "product": product}
    values = [contestants[name](*problem()) for name in ("loop", "argsort", "ours")]
    assert np.ptp(values) < 1e-6, values
    print(f"mAP {values[2]:.6f}, the same to 1e-6")
    figures = compare({name: partial(seconds, run) for name, run in contestants.items()}, options.rounds)
    goals = [Goal("ours", "loop", 100), Goal("ours", "argsort", 1.8), Goal("ours", "product", 1 / 2.2)]
    report("retrieval", figures, goals, before, "seconds", more_is_better=False)
    if options.large:
        large()


if __name__ == "__main__":
    main()

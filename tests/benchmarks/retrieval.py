"""Seconds for the exact mAP of 1,000 queries among 10,000 items: ours against a loop, sorting, and a lower bound.

    python -m tests.benchmarks.retrieval [--rounds 5]
    python -m tests.benchmarks.retrieval --large --rounds 1

2,048 channels, about five positives for each query. The loop is timed on a tenth of the queries and scaled.

--large: 60,000 items of 512 channels searched among each other, each contestant in its own process. Memory is the
largest resident size minus that with the descriptors loaded. The loop is timed on 200 queries and scaled. The accuracy
calculator of pytorch-metric-learning, if installed, searches by faiss if that is installed. On all items it computes
MAP@R, for which the R nearest are enough; its mAP takes memory that grows with the square of the items, and is
therefore compared on 10,000.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from multigrain.retrieval.metrics import MEASURES, Truth, average_precision, same_label
from multigrain.retrieval.ranking import mean_average_precision, ranks
from tests.benchmarks.table import Goal, compare, machine, report

QUERIES, ITEMS, CHANNELS = 1000, 10_000, 2048
LARGE, SMALL, LARGE_CHANNELS = 60_000, 10_000, 512
LOOPED = 200
"""Number of the loop's queries among 60,000 items."""


def descriptors(labels, channels, seed):
    """Non-negative descriptors of unit norm, as after a ReLU, most similar to those of their own label."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).random((labels.max() + 1, channels), dtype=np.float32) ** 4
    rows = centres[labels] + 2.5 * rng.random((len(labels), channels), dtype=np.float32) ** 4
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@cache
def problem():
    """Queries, items of twice as many objects as queries, in random order, and the truth."""
    objects = np.random.default_rng(1).permutation(ITEMS) % (2 * QUERIES)
    truth = [Truth(np.flatnonzero(objects == query), np.empty(0, np.int64)) for query in range(QUERIES)]
    return descriptors(np.arange(2 * QUERIES), CHANNELS, 2)[:QUERIES], descriptors(objects, CHANNELS, 3), truth


def loop(queries, database, truth):
    """mAP by the usual loop, which sorts the distances of one query at a time."""
    found = []
    for query, (positives, junk) in zip(queries, truth, strict=True):
        order = np.argsort(np.linalg.norm(database - query, axis=1))
        if len(junk):
            order = order[~np.isin(order, junk)]
        found.append(average_precision(np.flatnonzero(np.isin(order, np.setdiff1d(positives, junk)))))
    return np.mean(found)


def argsort(queries, database, truth):
    """mAP by one matrix product in fp32 and a sort of each query's scores."""
    orders = np.argsort(-(torch.from_numpy(queries) @ torch.from_numpy(database).T).numpy(), axis=1)
    found = [
        average_precision(np.flatnonzero(np.isin(order, positives)))
        for order, (positives, _) in zip(orders, truth, strict=True)
    ]
    return np.mean(found)


def product(queries, database, truth):
    """The lower bound: the matrix product that every exact evaluation computes."""
    torch.from_numpy(queries) @ torch.from_numpy(database).T


def seconds(run, share=1):
    """Seconds for all queries, measured on every `share`-th of them."""
    queries, database, truth = problem()
    started = time.perf_counter()
    run(queries[::share], database, truth[::share])
    return (time.perf_counter() - started) * share


def small(rounds):
    before = machine()
    contestants = {"loop": loop, "argsort": argsort, "ours": mean_average_precision, "product": product}
    values = [contestants[name](*problem()) for name in ("loop", "argsort", "ours")]
    assert np.ptp(values) < 1e-6, values
    print(f"mAP {values[2]:.6f}, the same to 1e-6")
    timed = {name: partial(seconds, run, 10 if run is loop else 1) for name, run in contestants.items()}
    goals = [Goal("ours", "loop", 100), Goal("ours", "argsort", 1.8), Goal("ours", "product", 1 / 2.2)]
    report("retrieval", compare(timed, rounds), goals, before, "seconds", more_is_better=False)


def labels_of(count):
    """Labels with as many items per object as in Stanford Online Products."""
    return np.random.default_rng(0).permutation(count) % (count * 11_316 // 60_000)


def ours_among(items, labels):
    found = ranks(items, items, same_label(labels))
    few = MEASURES["map"].values(found[:LOOPED]).mean()
    return {"mAP of some": few, **{name: MEASURES[name].values(found).mean() for name in ("map_finite", "map@r")}}


def loop_among(items, labels):
    return {"mAP of some": loop(items[:LOOPED], items, same_label(labels)[:LOOPED])}


def calculator_among(items, labels, k, name, ours):
    """A measure of pytorch-metric-learning, by its name here."""
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    search = None if find_spec("faiss") else CustomKNN(CosineSimilarity(), batch_size=256)
    calculator = AccuracyCalculator(include=(name,), k=k, knn_func=search, device=torch.device("cpu"))
    return {ours: calculator.get_accuracy(torch.from_numpy(items), torch.from_numpy(labels))[name]}


MAP_AT_R = partial(calculator_among, k="max_bin_count", name="mean_average_precision_at_r", ours="map@r")
MAP = partial(calculator_among, k=None, name="mean_average_precision", ours="map_finite")
OURS, OURS_SMALL = f"ours, {LARGE:,}", f"ours, {SMALL:,}"
PEER, PEER_SMALL = f"pytorch-metric-learning, MAP@R, {LARGE:,}", f"pytorch-metric-learning, mAP, {SMALL:,}"
AMONG = {
    OURS: (ours_among, LARGE),
    f"loop, {LARGE:,}": (loop_among, LARGE),
    PEER: (MAP_AT_R, LARGE),
    OURS_SMALL: (ours_among, SMALL),
    PEER_SMALL: (MAP, SMALL),
}


def resident(name):
    """A memory size of this process, in MB, by its name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e3


def measured(pipe, name, folder):
    """Send seconds, MB and measures of a contestant."""
    run, count = AMONG[name]
    items, labels = np.load(folder / f"{count}.npy"), labels_of(count)
    run(items[:100].copy(), np.arange(100) % 20)  # warm-up
    before, started = resident("VmRSS"), time.perf_counter()
    values = run(items, labels)
    used = (time.perf_counter() - started) * (count / LOOPED if run is loop_among else 1)
    pipe.send((used, resident("VmHWM") - before, values))


def in_a_process(name, folder):
    """Run `measured` in a new process; None if it sends nothing."""
    here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=measured, args=(there, name, folder))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return None
    finally:
        process.join()


def large(rounds):
    before, times, memory, values = machine(), {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (LARGE, SMALL):
            np.save(Path(folder) / f"{count}.npy", descriptors(labels_of(count), LARGE_CHANNELS, 1))
        for turn in range(1, rounds + 1):
            for name, (_, count) in AMONG.items():
                print(f"round {turn} of {rounds}: {name}", end="\x1b[K\r", file=sys.stderr, flush=True)
                outcome = in_a_process(name, Path(folder))
                if outcome is None:
                    print(f"{name}: not measured")
                    continue
                times.setdefault(name, []).append(outcome[0])
                memory.setdefault(name, []).append(outcome[1])
                for measure, value in outcome[2].items():
                    values.setdefault((measure, count), []).append(value)
    print(end="\x1b[K", file=sys.stderr, flush=True)
    assert all(np.ptp(found) < 1e-5 for found in values.values()), values
    print(
        "measures are the same to 1e-5; pytorch-metric-learning", "with" if find_spec("faiss") else "without", "faiss"
    )
    goals = [Goal(OURS, f"loop, {LARGE:,}"), Goal(OURS, PEER, 2), Goal(OURS_SMALL, PEER_SMALL, 2)]
    goals = [goal for goal in goals if goal.peer in times]
    report("retrieval-large-seconds", times, goals, before, "seconds", more_is_better=False)
    report("retrieval-large-memory", memory, [goal for goal in goals if goal.ratio], before, "MB", more_is_better=False)
    for found, most, unit in ((times, 60, "s"), (memory, 1000, "MB")):
        value = statistics.median(found[OURS])
        print(f"{OURS}: {value:.0f} {unit}, goal below {most:,}: {'met' if value < most else 'missed'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    (large if options.large else small)(options.rounds)


if __name__ == "__main__":
    main()

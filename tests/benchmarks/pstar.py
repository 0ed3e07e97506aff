"""Seconds for embeddings of ten exponents at two sizes: one pass for each size, against one for each exponent.

    python -m tests.benchmarks.pstar [--device cuda] [--trunk resnet50] [--images 8] [--rounds 2]

The images are in memory. Both contestants pool by GeM and end with the embeddings in CPU memory.
"""

import argparse
import time
from functools import partial

import torch

from multigrain.evaluation import embed
from multigrain.models.multigrain import MultiGrain
from multigrain.models.pooling import GeM, gem_all
from tests.benchmarks.table import Goal, compare, machine, report

EXPONENTS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
OFF_GRID = tuple(p + 0.3 for p in EXPONENTS)
SIZES = (224, 500)
BATCH = 8


def one_by_one(network, images, exponents):
    """Embeddings by one pass of the whole network for each exponent, the usual way."""
    found = []
    for p in exponents:
        network.pool = GeM(p)
        with torch.no_grad():
            found.append(torch.cat([network.embed(batch).cpu() for batch in images.split(BATCH)]))
    return torch.stack(found)


def ours(network, images, exponents):
    return torch.cat([embed.pooled(network, batch, exponents).cpu() for batch in images.split(BATCH)], dim=1)


def seconds(run, *arguments):
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def pooling_share(network, images):
    """Share of the time of one pass that pooling for all exponents takes."""

    def timed(run, argument, calls=5):
        times = []
        for _ in range(calls):
            if argument.is_cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            with torch.no_grad():
                run(argument)
            if argument.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    with torch.no_grad():
        maps = network.trunk(images)
    pooling = timed(lambda x: gem_all(x, EXPONENTS), maps)
    return pooling / (pooling + timed(network.trunk, images))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trunk", default="resnet50")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    before, figures, goals = machine(), {}, []
    network = MultiGrain(options.trunk, 1000).to(options.device).eval()
    for size in SIZES:
        images = torch.rand(options.images, 3, size, size, device=options.device)
        a, b = one_by_one(network, images[:2], EXPONENTS), ours(network, images[:2], EXPONENTS)  # warm
        print(f"{size} pixels: largest relative difference {((a - b).abs() / a.abs().clamp(min=1e-6)).max():.1e}")
        print(f"{size} pixels: pooling takes {pooling_share(network, images[:BATCH]):.1%} of a pass for all exponents")
        names = [f"{name}, {size} pixels" for name in ("one by one", "ours", "8 exponents", "8 off the grid", "single")]
        runs = (
            partial(seconds, one_by_one, network, images, EXPONENTS),
            partial(seconds, ours, network, images, EXPONENTS),
            partial(seconds, ours, network, images, EXPONENTS[:8]),
            partial(seconds, ours, network, images, OFF_GRID[:8]),
            partial(seconds, one_by_one, network, images, [3.0]),
        )
        figures |= compare(dict(zip(names, runs, strict=True)), options.rounds)
        goals.append(Goal(names[1], names[0], 9))
        goals += [Goal(name, names[4], 1 / 1.15) for name in names[2:4]]
    report(f"pstar-{options.trunk}", figures, goals, before, "seconds", more_is_better=False)


if __name__ == "__main__":
    main()

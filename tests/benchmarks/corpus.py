"""Images per second into an index: `grainmill embed` on one worker against a plain PyTorch loop.

    python -m tests.benchmarks.corpus [--images 1536] [--rounds 3] [--trunk resnet18]

JPEGs of 500 x 375 pixels and about 75 kB, embedded at 224 pixels by the same network. The plain loop uses a DataLoader
with one process for each core, Pillow and the transforms of torchvision's examples, in batches of 64, and keeps the
embeddings in memory. Measured from the first result to the last, without the start of processes.
"""

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from grainmill import trainable
from grainmill.cluster.session import connect
from grainmill.corpus import embed
from grainmill.registry import models
from grainmill.registry.model_card import ModelCard
from grainmill.tracking.mlflow_runs import Tracker, local_uri
from multigrain.config.training import MultiGrainSpec
from multigrain.models import checkpoint
from multigrain.models.multigrain import MultiGrain
from tests.benchmarks.embedding import FILES, Plain
from tests.benchmarks.loader import photo
from tests.benchmarks.table import Goal, compare, machine, report

BATCH = 64
OURS, PLAIN = "grainmill embed, one worker", "plain torch loop"


def plain(network, paths):
    """Images per second of the plain loop."""
    batches = DataLoader(Plain(paths), BATCH, num_workers=len(os.sched_getaffinity(0)))
    started, found = None, []
    with torch.no_grad():
        for images in batches:
            found.append(network(images).descriptor.numpy())
            started = started or time.perf_counter()
    assert len(np.concatenate(found)) == len(paths)
    return (len(paths) - BATCH) / (time.perf_counter() - started)


def ours(uri, model, source, out):
    """Images per second of `grainmill embed`, with Ray started before."""
    done = embed.embed(uri, model, str(source), out, 1, None, trainable.no_progress)
    assert not done.faults
    assert done.steady >= 512, "from the first answer to the last, of blocks of 256"
    return done.steady / done.seconds


def register(folder, trunk, image):
    """Register a network with random weights; return the tracking URI, the model's URI and the network."""
    spec = MultiGrainSpec.model_validate({"model": {"trunk": trunk}})
    network, classes = MultiGrain(trunk, 1000, spec.model.p), [str(number) for number in range(1000)]
    state = {"steps": 1, "spec": spec.model_dump(), "classes": classes}
    model = {f"{checkpoint.NETWORK}{name}": tensor for name, tensor in network.state_dict().items()}
    checkpoint.save(folder / "model", checkpoint.Checkpoint(model, {}, state))
    tracker = Tracker(local_uri(folder), "benchmark", folder)
    example = pd.DataFrame({"image": [image.read_bytes()]})
    run = tracker.start("made", {})
    card = ModelCard("multigrain.trainable", "", {}, [], {}, {}, {}, {})
    made = models.register(tracker, run, "benchmark", folder / "model", example, {}, card)
    return tracker.uri, made.uri, network.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trunk", default="resnet18")
    options = parser.parse_args()
    before, rng, rounds = machine(), np.random.default_rng(0), itertools.count()
    with tempfile.TemporaryDirectory() as name, connect(None):
        folder = Path(name)
        (folder / "images").mkdir()
        photos = [photo(rng) for _ in range(FILES)]
        paths = [folder / "images" / f"{number:06d}.jpg" for number in range(options.images)]
        for path, content in zip(paths, itertools.cycle(photos), strict=False):
            path.write_bytes(content)
        uri, model, network = register(folder, options.trunk, paths[0])
        contestants = {
            OURS: lambda: ours(uri, model, folder / "images", folder / f"index-{next(rounds)}"),
            PLAIN: lambda: plain(network, paths),
        }
        figures = compare(contestants, options.rounds)
    report("corpus", figures, [Goal(OURS, PLAIN, 0.95)], before, "images per second")


if __name__ == "__main__":
    main()

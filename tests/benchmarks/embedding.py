"""Images per second from JPEG files to embeddings: `evaluation.embed` against a plain torchvision loop.

    python -m tests.benchmarks.embedding [--device cuda] [--images 500] [--rounds 3] [--loaders 2]

JPEGs of 500 x 375 pixels and about 75 kB, a ResNet-18 at 224 pixels; the start of the loading processes is included.
Both contestants have the same weights; ours pools with p = 3, the plain loop by torchvision's average. The wait for
data is the time in which the main process has no batch to compute on.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from multigrain.evaluation import embed
from multigrain.models.multigrain import IMAGENET_MEAN, IMAGENET_STD, MultiGrain
from tests.benchmarks.loader import photo
from tests.benchmarks.table import Goal, compare, machine, report

SIZE, BATCH, FILES = 224, 32, 250
OURS, PLAIN = "ours", "plain torchvision loop"


class Plain(Dataset):
    """Images decoded by Pillow and prepared by the transforms of torchvision's examples."""

    def __init__(self, paths):
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize(256),
                transforms.CenterCrop(SIZE),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


class Wait:
    """Measures the seconds that a loop waits for its next batch."""

    def __init__(self):
        self.seconds = 0.0

    def of(self, batches):
        batches = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def plain(network, paths, device, loaders, wait):
    """Embeddings (N, C) by torchvision's network without its classifier."""
    batches = wait.of(DataLoader(Plain(paths), BATCH, num_workers=loaders))
    with torch.no_grad():
        return np.concatenate([network(images.to(device)).cpu().numpy() for images in batches])


@contextmanager
def timed_batches(wait):
    """Measure the wait for the batches of `embed` within the context."""
    batches = embed.evaluation_batches
    embed.evaluation_batches = lambda *args, **kwargs: wait.of(batches(*args, **kwargs))
    try:
        yield
    finally:
        embed.evaluation_batches = batches


def ours(network, paths, device, loaders, wait, p=3.0):
    with timed_batches(wait):
        return embed.embed(network, paths, SIZE, "crop", [p], device, loaders)[p]


def rate(run, paths, shares):
    """Images per second; the share of the time spent waiting is appended to `shares`."""
    wait, started = Wait(), time.perf_counter()
    run(paths, wait)
    used = time.perf_counter() - started
    shares.append(wait.seconds / used)
    return len(paths) / used


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loaders", type=int, default=2, help="number of image-reading processes")
    options = parser.parse_args()
    before, device = machine(), torch.device(options.device)
    network = MultiGrain("resnet18", 1000).to(device).eval()
    peer = torchvision.models.resnet18(weights=None)
    peer.load_state_dict({**peer.state_dict(), **network.trunk.state_dict()})
    peer.fc = torch.nn.Identity()
    peer = peer.to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        files = [Path(folder) / f"{number:03d}.jpg" for number in range(FILES)]
        size = np.mean([path.write_bytes(photo(rng)) for path in files]) / 1000
        print(f"{size:.1f} kB per image, {options.loaders} loaders")
        runs = {
            OURS: lambda paths, wait: ours(network, paths, device, options.loaders, wait),
            PLAIN: lambda paths, wait: plain(peer, paths, device, options.loaders, wait),
        }
        a, b = ours(network, files[:BATCH], device, 0, Wait(), 1.0), plain(peer, files[:BATCH], device, 0, Wait())
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        print(f"smallest cosine of both with p = 1, centred, each with its own decoder: {cosines.min():.4f}")
        paths, shares = list(islice(cycle(files), options.images)), {name: [] for name in runs}
        contestants = {name: partial(rate, run, paths, shares[name]) for name, run in runs.items()}
        figures = compare(contestants, options.rounds)
    for name, values in shares.items():
        print(f"{name}: {statistics.median(values):.1%} of the time is spent waiting for data")
        figures[f"{name}, without the wait"] = [
            speed / (1 - share) for speed, share in zip(figures[name], values, strict=True)
        ]
    report("embedding", figures, [Goal(OURS, PLAIN, 1)], before, "images per second")


if __name__ == "__main__":
    main()

"""Images per second of a training step: ours against plain cross-entropy loops with the same trunk.

    python -m tests.benchmarks.step [--device cuda] [--trunk resnet50] [--batch 48] [--steps 3] [--rounds 5]

Ours does more: it pools by GeM, pairs the copies, samples negatives and adds the margin loss. The images of all
contestants are in memory as uint8. The plain loop uses fp32 and torch's default layout; the tuned one uses channels
last and the precision that `compute.precision: auto` selects on this device.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from multigrain.config.training import MultiGrainSpec
from multigrain.data.dataset import Dataset
from multigrain.data.loading import Views
from multigrain.data.transforms import scale
from multigrain.training.trainer import Training, autocast_type
from tests.benchmarks.table import Goal, compare, machine, report

COPIES, CLASSES, SIZE = 3, 1000, 224


def plain(trunk, batch, device, tuned, precision):
    """A function that does a step of cross-entropy with torchvision's classifier."""
    layout = torch.channels_last if tuned else torch.contiguous_format
    network = torchvision.models.get_model(trunk, weights=None).to(device).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def step():
        images = (scale(batch.images) - mean) / std
        with torch.autocast(device.type, precision, enabled=tuned and precision is not None):
            logits = network(images.contiguous(memory_format=layout))
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ours(trunk, batch, device, policy, compiled):
    """A function that does a step as `fit` does, without reading images."""
    spec = MultiGrainSpec.model_validate(
        {
            "model": {"trunk": trunk},
            "batch": {"size": len(batch.labels), "repeats": COPIES},
            "augment": {"policy": policy},
            "compute": {"loaders": 0, "compile": compiled},
        }
    )
    count = 10 * len(batch.labels)
    everywhere = (Path("unread"),) * count
    labels = tuple(index % CLASSES for index in range(count))
    dataset = Dataset(tuple(map(str, range(CLASSES))), everywhere, labels, (), (), None, tuple(range(count)))
    training = Training(spec, dataset, device)
    training.loss.train()
    return partial(training._train_step, batch)


def images_per_second(step, images, steps, device):
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images * steps / (time.perf_counter() - started)


def matmul_peak(device, precision):
    """FLOP/s of a large matrix product in the precision of the trunk."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.rand(size, size, device=device, dtype=precision or torch.float32)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trunk", default="resnet18")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="add ours with compute.compile")
    options = parser.parse_args()
    device, before = torch.device(options.device), machine()
    precision = autocast_type(MultiGrainSpec().compute, device)
    images = torch.randint(0, 256, (options.batch, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    # Parameters that change no colours, as a loader gives them for the policy `torch`.
    colour = torch.tensor([1.0, 1, 1, 0, 1, 2, 0, 0, 0, 0, 1]).repeat(options.batch, 1).to(device)
    labels = torch.arange(options.batch, device=device) // COPIES
    batch = Views(images, colour, labels, labels)
    steps = {
        "plain": plain(options.trunk, batch, device, False, precision),
        "tuned": plain(options.trunk, batch, device, True, precision),
        "ours": ours(options.trunk, batch, device, "torch", False),
        "ours, jitter and lighting": ours(options.trunk, batch, device, "full", False),
    }
    if options.compile:
        steps["ours, compiled"] = ours(options.trunk, batch, device, "torch", True)
    for step in steps.values():  # warm
        step()
    measure = partial(images_per_second, images=options.batch, steps=options.steps, device=device)
    figures = compare({name: partial(measure, step) for name, step in steps.items()}, options.rounds)
    goals = [Goal("ours", "tuned", 0.95), Goal("ours", "plain", 2.3), Goal("ours, jitter and lighting", "tuned")]
    report(f"step-{options.trunk}-{device.type}", figures, goals, before, "images per second")
    with FlopCounterMode(display=False) as counter:
        steps["tuned"]()
    flops = counter.get_total_flops() / options.batch
    peak = matmul_peak(device, precision)
    rate = max(figures["ours"]) * flops
    print(f"{precision or torch.float32}: {flops / 1e9:.1f} GFLOP per image, {rate / 1e12:.3g} TFLOP/s,", end=" ")
    print(f"{rate / peak:.0%} of a matrix product's {peak / 1e12:.3g}")


if __name__ == "__main__":
    main()

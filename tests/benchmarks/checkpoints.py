"""Time that training waits for a checkpoint: ours, written in the background, against torch.save.

    python -m tests.benchmarks.checkpoints [--device cuda] [--rounds 5]

A ResNet-50 and its momentum, 205 MB. Also the time of a call of `ray.train.report`, which ours makes once an epoch.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import ray
import ray.train
import torch
import torchvision
from ray.train.torch import TorchTrainer

from multigrain.config.training import MultiGrainSpec
from multigrain.models.checkpoint import Checkpoint, Writer
from tests.benchmarks.table import Goal, compare, machine, report

REPORTS = 5


def state(device):
    network = torchvision.models.resnet50().to(device)
    momentum = {index: {"momentum_buffer": torch.rand_like(p)} for index, p in enumerate(network.parameters())}
    return Checkpoint(network.state_dict(), {"state": momentum, "param_groups": []}, {"steps": 1})


def in_place(checkpoint, folder):
    started = time.perf_counter()
    torch.save(checkpoint._asdict(), folder / "checkpoint.pt")
    return 1e3 * (time.perf_counter() - started)


def in_background(checkpoint, writer):
    """Milliseconds until training can go on; the end of the writing is awaited outside the measurement."""
    started = time.perf_counter()
    writer.save(checkpoint)
    blocked = 1e3 * (time.perf_counter() - started)
    writer.wait()
    return blocked


def reports(config):
    started = time.perf_counter()
    for _ in range(REPORTS):
        ray.train.report({"x": 1.0})
    Path(config["out"]).write_text(str(1e3 * (time.perf_counter() - started) / REPORTS))


def milliseconds_of_a_report(folder):
    out = folder / "report"
    run = ray.train.RunConfig(storage_path=str(folder))
    scaling = ray.train.ScalingConfig(num_workers=1)
    TorchTrainer(reports, train_loop_config={"out": str(out)}, scaling_config=scaling, run_config=run).fit()
    return float(out.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    before, checkpoint = machine(), state(options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = Writer(folder / "ours")
        contestants = {
            "ours": partial(in_background, checkpoint, writer),
            "torch.save": partial(in_place, checkpoint, folder),
        }
        figures = compare(contestants, options.rounds)
        writer.close()
        report("checkpoints", figures, [Goal("ours", "torch.save", 10)], before, "milliseconds", more_is_better=False)
        every = MultiGrainSpec().compute.checkpoint_steps
        print(f"a checkpoint every {every} steps: {min(figures['ours']) / every:.3f} ms a step")
        ray.init(address="local", num_cpus=2, object_store_memory=2**27, include_dashboard=False, log_to_driver=False)
        try:
            print(f"a call of ray.train.report, several in a row: {milliseconds_of_a_report(folder):.0f} ms")
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()

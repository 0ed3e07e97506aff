"""Two workers under Ray Train against two under torchrun: images per second, and time outside the steps.

    python -m tests.benchmarks.ddp [--rounds 3] [--steps 24]

Both run the same steps of ResNet-18 on images of 96 pixels in memory, over gloo.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKERS, SIZE, BATCH, WARM = 2, 96, 48, 4


def steps(config):
    """Train on one worker; rank 0 writes the rate, measured after the warm-up steps."""
    import torch
    from torch import distributed

    from multigrain.config.training import MultiGrainSpec
    from multigrain.data.dataset import Dataset
    from multigrain.data.loading import Views
    from multigrain.training.trainer import Training

    torch.set_num_threads(1)
    spec = MultiGrainSpec.model_validate({"model": {"trunk": "resnet18"}, "batch": {"size": BATCH}, "image_size": SIZE})
    labels = tuple(index % 100 for index in range(10 * BATCH))
    classes, everywhere = tuple(map(str, range(100))), (Path("unread"),) * len(labels)
    training = Training(spec, Dataset(classes, everywhere, labels, (), (), None), torch.device("cpu"))
    training.loss.train()
    own = BATCH // WORKERS
    images = torch.randint(0, 256, (own, 3, SIZE, SIZE), dtype=torch.uint8)
    colour = torch.tensor([1.0, 1, 1, 0, 1, 2, 0, 0, 0, 0, 1]).repeat(own, 1)
    batch = Views(images, colour, torch.arange(own), torch.arange(own))
    for step in range(WARM + config["steps"]):
        if step == WARM:
            distributed.barrier()
            started = time.perf_counter()
        training._train_step(batch)
        training.stop_signal.after_step()
    distributed.barrier()
    if distributed.get_rank() == 0:
        Path(config["out"]).write_text(json.dumps(BATCH * config["steps"] / (time.perf_counter() - started)))


def torchrun(config):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "-m", "tests.benchmarks.ddp", "--child", json.dumps(config)], check=True, env=environment)


def ray_train(config):
    import ray.train
    from ray.train.torch import TorchTrainer

    scaling = ray.train.ScalingConfig(num_workers=WORKERS)
    storage = ray.train.RunConfig(storage_path=str(Path(config["out"]).parent))
    TorchTrainer(steps, train_loop_config=config, scaling_config=scaling, run_config=storage).fit()


def child(config):
    from torch import distributed

    distributed.init_process_group("gloo")
    steps(config)
    distributed.destroy_process_group()


def rates(launch, config, seconds):
    """Images per second of one launch; the time it took outside the steps is appended to `seconds`."""
    started = time.perf_counter()
    launch(config)
    rate = json.loads(Path(config["out"]).read_text())
    seconds.append(time.perf_counter() - started - BATCH * config["steps"] / rate)
    return rate


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    import ray

    from tests.benchmarks.table import Goal, compare, machine, report

    before = machine()
    ray.init(address="local", num_cpus=WORKERS, object_store_memory=2**27, include_dashboard=False, log_to_driver=False)
    around = {"Ray Train": [], "torchrun": []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = {"steps": options.steps, "out": f"{folder}/rate.json"}
            launches = {"Ray Train": ray_train, "torchrun": torchrun}
            measures = {
                name: lambda name=name, launch=launch: rates(launch, config, around[name])
                for name, launch in launches.items()
            }
            figures = compare(measures, options.rounds)
    finally:
        ray.shutdown()
    report("ddp", figures, [Goal("Ray Train", "torchrun", 0.97)], before, "images per second")
    report("ddp-start", around, [Goal("Ray Train", "torchrun")], before, "seconds outside the steps", False)


if __name__ == "__main__":
    main()

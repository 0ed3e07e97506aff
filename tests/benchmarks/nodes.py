"""Two workers on two nodes against two on one node, on the same cores: images per second.

    python -m tests.benchmarks.nodes [--rounds 3] [--steps 24]

The nodes are network namespaces of this machine, connected by a virtual cable. Measured is the cost of sending all
gradients through a network, not the speed of a real network. The steps are those of `ddp`.
"""

import argparse
import os
import sys
import tempfile

from tests.benchmarks.ddp import WORKERS, rates, steps
from tests.benchmarks.table import Goal, compare, machine, report
from tests.support import hosts


def launch(strategy, config):
    import ray.train
    from ray.train.torch import TorchTrainer

    from grainmill.execution.network import Network

    scaling = ray.train.ScalingConfig(num_workers=WORKERS, placement_strategy=strategy)
    storage = ray.train.RunConfig(storage_path=os.path.dirname(config["out"]))
    before = hosts.crossed()
    trainer = TorchTrainer(
        steps, train_loop_config=config, scaling_config=scaling, run_config=storage, torch_config=Network()
    )
    trainer.fit()
    come, gone = (after - first for first, after in zip(before, hosts.crossed(), strict=True))
    assert (min(come, gone) > config["steps"] * 2**20) == (strategy == "STRICT_SPREAD")  # a step sends more than this


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    if "GRAINMILL_INSIDE" not in os.environ:
        path = os.pathsep.join(path or os.getcwd() for path in sys.path)
        command = [*hosts.INSIDE, sys.executable, "-m", "tests.benchmarks.nodes", *sys.argv[1:]]
        os.execvpe(command[0], command, {**os.environ, "GRAINMILL_INSIDE": "1", "PYTHONPATH": path})
    before = machine()
    hosts.join()
    hosts.start((WORKERS, WORKERS))
    around = []
    with tempfile.TemporaryDirectory() as folder:
        config = {"steps": options.steps, "out": f"{folder}/rate.json"}
        strategies = {"two nodes": "STRICT_SPREAD", "one node": "STRICT_PACK"}
        figures = compare(
            {
                name: lambda strategy=strategy: rates(lambda config: launch(strategy, config), config, around)
                for name, strategy in strategies.items()
            },
            options.rounds,
        )
    report("nodes", figures, [Goal("two nodes", "one node")], before, "images per second")


if __name__ == "__main__":
    main()

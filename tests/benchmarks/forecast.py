"""Accuracy of `grainmill plan`: its epochs and hours against those of simulated searches.

    python -m tests.benchmarks.forecast [--seeds 10] [--trials 64] [--epochs 27]

The searches run in simulated worlds (see `curves`), with all that the forecast leaves out: trials that are good at one
rung are good later, too, the sampler learns, and epochs differ in length. The forecast knows the mean time of an epoch,
and nothing else of the world.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from grainmill.cluster.shape import Cluster, NodeType
from grainmill.config.space import Setting
from grainmill.workflows import forecast
from grainmill.workflows.forecast import Pace
from tests.benchmarks import curves
from tests.benchmarks.search import WORKERS, Ours, experiment
from tests.benchmarks.table import FOLDER, machine

ON = Cluster(NodeType("head", {"CPU": 0}, 1), (NodeType("worker", {"CPU": 1}, WORKERS),), WORKERS, 300)
PLAYS = 20
CONTESTS: Mapping[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "one objective": (("mean",), {}),
    "two objectives": (curves.METRICS, {}),
    "two objectives, losers pause": (curves.METRICS, {"losers": "pause"}),
    "two objectives, random sampler": (curves.METRICS, {"sampler": "random"}),
    "without stopping": (curves.METRICS, {"scheduler": "none"}),
}


class Clocked(curves.World):
    """A world that records the seconds of every epoch trained in it."""

    def __init__(self, seed: int, epochs: int) -> None:
        super().__init__(seed, epochs)
        self.lengths: list[float] = []

    def training(self, setting: Setting, number: int) -> Iterator[tuple[float, dict[str, float]]]:
        for seconds, metrics in super().training(setting, number):
            self.lengths.append(seconds)
            yield seconds, metrics


def ratios(
    objectives: tuple[str, ...], search: Mapping[str, Any], seed: int, trials: int, epochs: int
) -> dict[str, float]:
    """Forecast divided by simulation: epochs, and hours until the last complete trial."""
    world = Clocked(seed, epochs)
    finished = curves.play(world, Ours(world, objectives, trials, **search), WORKERS, float("inf"))
    checked = experiment(objectives, epochs, trials=trials, **search)
    pace = Pace(statistics.fmean(world.lengths), 0, 0)
    plays = [forecast.simulate(checked, ON, pace, seed) for seed in range(PLAYS)]
    came = max(one.seconds for one in finished) / WORKERS
    return {
        "epochs": statistics.fmean(one.epochs[0] for one in plays) / len(world.lengths),
        "hours": statistics.fmean(one.search for one in plays) / came,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=27)
    options = parser.parse_args()
    before, results = machine(), {}
    print(f"forecast divided by simulation, {options.seeds} worlds, {options.trials} trials of {options.epochs} epochs")
    print(f"{'':<36}{'min':>8}{'median':>8}{'max':>8}")
    for name, (objectives, search) in CONTESTS.items():
        found = [ratios(objectives, search, seed, options.trials, options.epochs) for seed in range(options.seeds)]
        for what in ("epochs", "hours"):
            values = [one[what] for one in found]
            results[f"{name}, {what}"] = values
            print(f"{f'{name}, {what}':<36}{min(values):>8.3f}{statistics.median(values):>8.3f}{max(values):>8.3f}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "forecast.json"
    path.write_text(json.dumps({"name": "forecast", **before, "ratios": results}))
    print(path)


if __name__ == "__main__":
    main()

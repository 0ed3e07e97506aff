"""Simulated trainings of a MultiGrain search space, run by workers in virtual time.

Two objectives trade off through lambda. Learning curves cross: trainings with more copies of an image start lower and
end higher, as in Fig. A.1 of the paper, and so do those with higher rates.
"""

import heapq
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from grainmill.config.space import Parameter, Scalar, Setting, resolve

SPACE = {
    "loss.weight": {"uniform": [0.1, 1.0], "when": {"batch.repeats": [2, 3, 4]}, "otherwise": 1.0},
    "model.p": {"uniform": [1.0, 6.0]},
    "batch.repeats": {"choice": [1, 2, 3, 4]},
    "augment.crop": {"loguniform": [0.04, 0.8]},
    "optimizer.rate": {"loguniform": [0.02, 2.0]},
}
METRICS = ("top1", "copy_map")
"""Simulated metrics, in percent; larger is better."""
FLOOR = {"top1": 60.0, "copy_map": 40.0, "mean": 50.0}
"""Reference point of hypervolumes: settings below it do not count."""
EPOCH_SECONDS = 60.0
DRAWS = 4000
"""Number of random settings from which the best possible result of a world is found."""


def lag(repeats: int, progress: float) -> float:
    """Percentage points below the final value after a share of the epochs, at the published learning rate.

    Fitted to Fig. A.1 for 1 and 3 copies: 72.4 and 70.5 after a third, equal at epoch 70 of 120, 0.9 apart at the end.
    """
    return (19 + 2.3 * (repeats - 1)) * (1 - progress) ** (4 - 0.42 * (repeats - 1))


def front(points: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The points that no other dominates, sorted by descending first value."""
    height = -math.inf
    for x, y in sorted(set(points), reverse=True):
        if y > height:
            height = y
            yield x, y


def hypervolume(points: list[tuple[float, float]], floor: tuple[float, float]) -> float:
    """Area between the floor and the points above it; in both values, larger is better."""
    area, height = 0.0, floor[1]
    for x, y in front([(x, y) for x, y in points if x > floor[0] and y > floor[1]]):
        area, height = area + (x - floor[0]) * (y - height), y
    return area


class World:
    """A simulated data set, with the optima of its settings and the noise of its trainings."""

    def __init__(self, seed: int, epochs: int) -> None:
        self.seed, self.epochs = seed, epochs
        random = np.random.default_rng(seed)
        self.weight = random.uniform([0.2, 0.6], [0.7, 1.0])  # optimum for top1 and for copy_map, as in the next lines
        self.p = random.uniform([1.0, 2.5], [3.0, 6.0])
        self.crop = np.log(random.uniform([0.1, 0.2], [0.4, 0.7]))
        self.rate = np.log(random.uniform([0.05, 0.05], [0.8, 0.8]))
        parameters = {name: Parameter.model_validate(content) for name, content in SPACE.items()}
        settings = [resolve(parameters, lambda _, parameter: drawn(random, parameter)) for _ in range(DRAWS)]
        self.best = {True: self.volume(settings, True), False: self.volume(settings, False)}

    def end(self, setting: Setting) -> tuple[float, float]:
        """Both metrics after the last epoch, without noise."""
        repeats = setting["batch.repeats"]
        rate, crop = math.log(setting["optimizer.rate"]), math.log(setting["augment.crop"])
        off = 1.2 * (rate - self.rate) ** 2, 2.0 * (crop - self.crop) ** 2, 0.5 * (setting["model.p"] - self.p) ** 2
        top1, copy_map = -off[0] - off[1] - off[2] * [0.5, 2.0]
        top1 += 76.2 + (0, 0.6, 0.9, 1.0)[repeats - 1] - 12 * (setting["loss.weight"] - self.weight[0]) ** 2
        copy_map += 70 + (0, 5, 7, 7.5)[repeats - 1]
        if repeats > 1:  # else there is nothing for the margin loss to compare
            copy_map -= 30 * (setting["loss.weight"] - self.weight[1]) ** 2
        return float(top1), float(copy_map)

    def training(self, setting: Setting, number: int) -> Iterator[tuple[float, dict[str, float]]]:
        """Seconds and metrics of each epoch; the number is the seed: the same one repeats the same training."""
        random = np.random.default_rng([self.seed, number])
        speed = EPOCH_SECONDS * (0.8 + 0.2 / setting["batch.repeats"]) * math.exp(random.normal(0, 0.1))
        ends = np.array(self.end(setting)) + random.normal(0, [0.15, 0.4])
        behind = math.exp(0.15 * math.log(setting["optimizer.rate"] / 0.2))
        for epoch in range(1, self.epochs + 1):
            gap = behind * lag(setting["batch.repeats"], epoch / self.epochs)
            top1, copy_map = ends - gap * np.array([1, 1.5]) + random.normal(0, [0.1, 0.3])
            metrics = {"epoch": epoch, "top1": top1, "copy_map": copy_map, "mean": (top1 + copy_map) / 2}
            yield speed * math.exp(random.normal(0, 0.03)), {name: float(value) for name, value in metrics.items()}

    def volume(self, settings: list[Setting], both: bool) -> float:
        """Hypervolume of the settings' final metrics; with one objective, the best mean minus the floor."""
        ends = [self.end(setting) for setting in settings]
        if both:
            return hypervolume(ends, (FLOOR["top1"], FLOOR["copy_map"]))
        return max([0.0, *(sum(end) / 2 - FLOOR["mean"] for end in ends)])


def drawn(random: np.random.Generator, parameter: Parameter) -> Scalar:
    """A random value of a parameter, uniform in its range."""
    if parameter.choice:
        return parameter.choice[random.integers(len(parameter.choice))]
    if parameter.uniform:
        return random.uniform(*parameter.uniform)
    return math.exp(random.uniform(*np.log(parameter.loguniform)))


class Player(Protocol):
    """A search algorithm."""

    def suggest(self) -> tuple[int, Setting] | None:
        """Number and setting of the next trial, new or paused before; None: ask again later."""

    def goes_on(self, number: int, metrics: Mapping[str, float]) -> bool:
        """Record the metrics of an epoch, and return True if the trial continues."""

    def ended(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record that a trial ended with these metrics, complete or stopped."""


class Finish(NamedTuple):
    """A trial that ran all its epochs."""

    seconds: float
    """Time of all workers from the start of the search to the end of the trial."""
    setting: Setting


def play(world: World, player: Player, workers: int, budget: float) -> list[Finish]:
    """Complete trials within a budget of worker seconds, which include waiting."""
    finished: list[Finish] = []
    trainings: dict[int, Iterator[tuple[float, dict[str, float]]]] = {}
    running: list[tuple[float, int, Setting, dict[str, float]]] = []
    now, free = 0.0, workers

    def proceed(number: int, setting: Setting) -> None:
        seconds, metrics = next(trainings[number])
        heapq.heappush(running, (now + seconds, number, setting, metrics))

    while True:
        while free and (suggestion := player.suggest()):
            number, setting = suggestion
            trainings.setdefault(number, world.training(setting, number))
            proceed(number, setting)
            free -= 1
        if not running or running[0][0] * workers > budget:
            return finished
        now, number, setting, metrics = heapq.heappop(running)
        if player.goes_on(number, metrics) and metrics["epoch"] < world.epochs:
            proceed(number, setting)
            continue
        if metrics["epoch"] == world.epochs:
            finished.append(Finish(now * workers, setting))
        player.ended(number, metrics)
        free += 1


def share(world: World, finished: list[Finish], both: bool, seconds: float) -> float:
    """Share of the best possible result of the world that the trials finished after some seconds have reached."""
    return world.volume([trial.setting for trial in finished if trial.seconds <= seconds], both) / world.best[both]

"""Forecast of the time and the nodes that a run takes: the search and the training of the best again, simulated.

The trials go through the rungs of the real ASHA. The quality of a trial is unknown before a search, so it is drawn at
random.
"""

import heapq
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from grainmill.cluster.shape import Cluster, NodeType, trials_that_fit
from grainmill.config.experiment import Experiment
from grainmill.config.resources import Need
from grainmill.config.space import Scalar
from grainmill.errors import StorageError
from grainmill.search.asha import ASHA
from grainmill.search.records import TrialRecord
from grainmill.storage import sqlite

STUDY = "trial"
"""Name of the study of a search in the database of its run."""
LEARNING = 0.15
"""Gain of a sampler that learns: trial n is better by this times log(1 + n), where random trials spread evenly from 0
to 1. Fitted to the searches of `tests/benchmarks/forecast.py`, whose epochs it meets within 10 % in the median. More
trials pass the rungs than in a random search, since later trials are better than earlier ones."""
RANDOM_SAMPLERS = ("random", "qmc", "grid")
"""Samplers that do not learn."""


@dataclass(frozen=True)
class Pace:
    """Durations that a simulation takes for granted, in seconds."""

    epoch: float
    """An epoch on the workers of a trial; other numbers of workers are proportionally faster or slower."""
    boot: float
    """Time from the request for a node until the node works."""
    start: float
    """Start of the processes of a trial on nodes that work; a later trial uses the processes of an earlier one."""


@dataclass(frozen=True)
class SimulatedRun:
    """Result of one simulation; times are in seconds, those of nodes summed over nodes."""

    search: float
    """Duration of the search."""
    retraining: float
    """Duration of the training of the best trials again."""
    epochs: tuple[int, int]
    """Epochs of the search, and of the training of the best again."""
    busy: tuple[float, float]
    """Time of workers in the search, and in the training of the best again."""
    nodes: Mapping[str, float]
    """Time of nodes by type, from the request until they go; the head stays until the last node has gone."""
    booting: float
    waiting: float
    """Time of nodes, or of their shares, without work while other trials run."""
    leaving: float
    """Time of nodes without work until their time-out has passed."""


@dataclass
class _Node:
    """A node and its times, also those of earlier stays of the same node."""

    type: NodeType
    size: int
    """Number of workers that the node has room for."""
    stays: bool
    """True if the node is there from the start and never goes."""
    free: int = 0
    asked: float = 0.0
    ready: float = 0.0
    idle: float = math.inf
    """Time since when the node has no work; inf while it works."""
    seconds: float = 0.0
    booting: float = 0.0
    leaving: float = 0.0
    busy: float = 0.0
    """Time of its workers, including the start of their processes."""


class _Fleet:
    """The nodes of a cluster, which come on request and go after a time without work."""

    def __init__(self, cluster: Cluster, bundle: Mapping[str, float], boot: float) -> None:
        self.boot, self.timeout = boot, cluster.idle_seconds
        count: Counter[str] = Counter()
        self.nodes: list[_Node] = []
        for one in cluster.nodes_for(bundle):
            count[one.name] += 1
            stays, size = one is cluster.head or count[one.name] <= one.min_nodes, one.holds(bundle)
            self.nodes.append(_Node(one, size, stays, free=size, idle=0.0 if stays else -math.inf))

    def _gone(self, node: _Node, now: float) -> bool:
        return not node.stays and now > node.idle + self.timeout

    def workers(self, need: Need) -> int:
        """Number of workers of a trial: the largest that is allowed and has room."""
        return min(need.most, sum(node.size for node in self.nodes))

    def take(self, workers: int, one_per_node: bool, now: float) -> tuple[float, list[_Node]]:
        """Place the workers of a trial; returns the time when all their nodes are ready, and the nodes."""
        # All on one node if one has room: first nodes that are there, then those with the least room that is enough.
        # Otherwise on the emptiest nodes.
        together = 1 if one_per_node else workers
        candidates = sorted(
            self.nodes,
            key=lambda node: (
                node.free < together,
                self._gone(node, now),
                node.free if together <= node.free and not one_per_node else -node.free,
            ),
        )
        places: list[_Node] = []
        for node in candidates:
            count = min(node.free, together, workers - len(places))
            if count:
                self._wake(node, now)
                node.free -= count
                places += [node] * count
        assert len(places) == workers, "no more trials run at once than there is room for"
        return max(now, *(node.ready for node in places)), places

    def _wake(self, node: _Node, now: float) -> None:
        if self._gone(node, now):
            self._leave(node)
            node.asked, node.ready = now, now + self.boot
        node.idle = math.inf

    def _leave(self, node: _Node) -> None:
        if math.isinf(node.idle):  # the node never came
            return
        node.seconds += node.idle + self.timeout - node.asked
        node.booting += node.ready - node.asked
        node.leaving += self.timeout

    def give(self, places: Sequence[_Node], began: float, now: float) -> None:
        """Free the places of a trial that ran from `began` until `now`."""
        for node in places:
            node.free += 1
            node.busy += now - began
            if node.free == node.size:
                node.idle = now

    def close(self, now: float) -> float:
        """End all work; returns the time when the last node goes, until which the nodes that stay are counted."""
        last = max([now, *(node.idle + self.timeout for node in self.nodes if not node.stays)])
        for node in self.nodes:
            if node.stays:
                node.seconds = last
            else:
                self._leave(node)
        return last


class _Work(Protocol):
    """Trials to run."""

    def next(self) -> int | None:
        """Number of the trial to begin or to go on with; None if there is none at the moment."""

    def goes_on(self, number: int, seconds: float) -> bool:
        """Count an epoch of a trial, which took the workers `seconds`; returns True if the trial goes on."""


class _Search:
    """The trials of a search. The quality of a trial is drawn once; a paused trial goes on where it was paused."""

    def __init__(self, experiment: Experiment, amounts: Mapping[str, float], chance: random.Random) -> None:
        self.experiment, self.chance, self.asha = experiment, chance, ASHA(experiment)
        budget = experiment.budget
        hours = {"GPU": budget.gpu_hours, "CPU": budget.cpu_hours}
        self.limits = [3600 * limit / amounts[name] for name, limit in hours.items() if limit and amounts.get(name)]
        self.records: list[TrialRecord] = []
        self.paused: set[int] = set()
        self.busy, self.epochs, self.complete = 0.0, 0, 0

    @property
    def spent(self) -> bool:
        return any(self.busy >= limit for limit in self.limits)

    def next(self) -> int | None:
        if self.spent:
            return None
        if promoted := self.asha.promoted(self.records[number] for number in self.paused):
            self.paused.discard(promoted.number)
            return promoted.number
        number = len(self.records)
        if number == self.experiment.search.trials:
            return None
        setting = self.experiment.reference if number == 0 else {"number": number, **self._stratum()}
        self.records.append(TrialRecord(number, "running", setting, (), (), None, {}, {}))
        return number

    def _stratum(self) -> dict[str, Scalar]:
        name = self.experiment.search.stratify
        return {name: self.chance.choice(self.experiment.space[name].values or ())} if name else {}

    def _quality(self, number: int) -> dict[str, float]:
        """Draw the value of each objective for a trial."""
        lift = 0.0 if self.experiment.search.sampler in RANDOM_SAMPLERS else LEARNING * math.log1p(number)
        signs = {name: 1 if way == "max" else -1 for name, way in self.experiment.objective.items()}
        return {name: sign * (self.chance.random() + lift) for name, sign in signs.items()}

    def goes_on(self, number: int, seconds: float) -> bool:
        record = self.records[number]
        values = record.history[-1] if record.history else self._quality(number)
        epoch = int(values.get("epoch", 0)) + 1
        record = self.records[number] = replace(record, history=({**values, "epoch": epoch},))
        self.busy, self.epochs = self.busy + seconds, self.epochs + 1
        if epoch >= self.experiment.base.epochs:
            self.complete += 1
            return False
        if self.spent:
            return False
        verdict = self.asha.judge(record)
        if verdict == "pause":
            self.paused.add(number)
        return verdict == "continue"


class _Retraining:
    """Trainings that run to their end."""

    def __init__(self, count: int, epochs: int) -> None:
        self.left, self.length, self.busy, self.epochs = count, epochs, 0.0, 0
        self.done: Counter[int] = Counter()

    def next(self) -> int | None:
        if not self.left:
            return None
        self.left -= 1
        return self.left

    def goes_on(self, number: int, seconds: float) -> bool:
        self.busy, self.epochs = self.busy + seconds, self.epochs + 1
        self.done[number] += 1
        return self.done[number] < self.length


@dataclass(order=True)
class _Running:
    until: float
    number: int
    began: float = field(compare=False)
    places: list[_Node] = field(compare=False)


def _run(work: _Work, fleet: _Fleet, need: Need, limit: int | None, pace: Pace, now: float) -> float:
    """Run trials from `now` on, as many at once as there is room for; returns when the last has ended."""
    fits, workers = trials_that_fit([node.type for node in fleet.nodes], need), fleet.workers(need)
    at_once = min(fits, limit or fits)
    running: list[_Running] = []
    started = 0
    while True:
        while len(running) < at_once and (number := work.next()) is not None:
            began, places = fleet.take(workers, need.one_per_node, now)
            start = pace.start if len(running) == started else 0.0
            started = max(started, len(running) + 1)
            heapq.heappush(running, _Running(began + start + pace.epoch, number, began, places))
        if not running:
            return now
        one = heapq.heappop(running)
        now = one.until
        if work.goes_on(one.number, pace.epoch * workers):
            heapq.heappush(running, replace(one, until=now + pace.epoch))
        else:
            fleet.give(one.places, one.began, now)


def simulate(experiment: Experiment, cluster: Cluster, pace: Pace, seed: int) -> SimulatedRun:
    """Simulate one run.

    Args:
        experiment: the settings of the run.
        cluster: nodes to run on, all without work; a trial must fit into them.
        pace: durations.
        seed: seed of the random draws.
    """
    resources = experiment.resources
    need, need_again = resources.need(resources.workers), resources.need(resources.retrain_workers)
    fleet = _Fleet(cluster, resources.bundle, pace.boot)
    search = _Search(experiment, resources.bundle, random.Random(seed))
    ended = _run(search, fleet, need, resources.concurrent, pace, 0.0)
    best = min(experiment.winner.candidates, search.complete)
    rest = _Retraining(best * experiment.winner.seeds, experiment.base.epochs)
    again = replace(pace, epoch=pace.epoch * fleet.workers(need) / fleet.workers(need_again))
    last = _run(rest, fleet, need_again, resources.concurrent, again, ended)
    gone = fleet.close(last)
    nodes: dict[str, float] = defaultdict(float)
    for node in fleet.nodes:
        nodes[node.type.name] += node.seconds
    nodes[cluster.head.name] = gone
    booting, leaving = sum(node.booting for node in fleet.nodes), sum(node.leaving for node in fleet.nodes)
    waiting = sum(node.seconds - node.booting - node.leaving - node.busy / node.size for node in fleet.nodes)
    epochs, busy = (search.epochs, rest.epochs), (search.busy, rest.busy)
    return SimulatedRun(ended, last - ended, epochs, busy, nodes, booting, waiting, leaving)


def epoch_seconds(folder: Path) -> float:
    """Median time of an epoch in the search of an earlier run, between two successive reports of a trial.

    Args:
        folder: the folder of the run, such as `grainmill-runs/demo/run-1`; it is only read.
    Raises:
        StorageError: there is no study, or no trial in it has two epochs.
    """
    import optuna
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    file = folder / "study.db"
    if not file.is_file():
        raise StorageError(
            f"an earlier run has its study in its folder, but there is no {file.absolute()}; name one such as "
            "grainmill-runs/demo/run-1, or give --epoch-seconds"
        )
    try:
        study = optuna.load_study(study_name=STUDY, storage=optuna.storages.RDBStorage(sqlite.url_of(file)))
        histories = [trial.user_attrs.get("history", ()) for trial in study.get_trials(deepcopy=False)]
    except (KeyError, RuntimeError, StorageInternalError, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0]
        raise StorageError(f"{file} must hold a search, but cannot be read ({reason}); give --epoch-seconds") from error
    times = [after["at"] - before["at"] for rows in histories for before, after in pairwise(rows)]
    if not times:
        raise StorageError(
            f"the time of an epoch is taken between two reports of a trial, but in {folder} no trial has two; give "
            "--epoch-seconds"
        )
    return statistics.median(times) / 1000

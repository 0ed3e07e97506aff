"""What a run will take of a cluster: its search and the training of the best again, played through in virtual time.

Trials go through the rungs of the real asha, with values drawn at random, for how good they will be is not known.
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

STUDY = "trial"
"""Name of the study of a search in the database of its run."""
LEARNING = 0.15
"""Of a sampler that learns: trial n is better by so much times log(1 + n), where trials without it spread evenly from 0
to 1. Fitted to the searches of `tests/benchmarks/forecast.py`, whose epochs it meets within 10 % in the median. More
trials pass the rungs than in a random search: the later ones are better than those that they are held against."""
STRANGERS = ("random", "qmc", "grid")
"""Samplers that do not learn."""


@dataclass(frozen=True)
class Pace:
    """How long things take, in seconds."""

    epoch: float
    """On the workers of a trial; the best are trained again at the same number of images per worker and second."""
    boot: float
    """Until a node works that was asked for."""
    start: float
    """Until the processes of a trial have begun, on nodes that work; those of one that has ended are used again."""


@dataclass(frozen=True)
class Course:
    """What came of one play; times in seconds, those of nodes added over nodes."""

    search: float
    """Until the last trial of the search has ended."""
    again: float
    """From then on, until the best have been trained again."""
    epochs: tuple[int, int]
    """Of the search; of the training of the best again."""
    busy: tuple[float, float]
    """Seconds of workers, likewise."""
    nodes: Mapping[str, float]
    """By type, the head included, until each has gone; the head stays until the last."""
    booting: float
    waiting: float
    """Of nodes, or of the shares of them, that could have worked: for the last trials of a wave, or for others."""
    leaving: float
    """Of nodes without work whose time-out has not passed."""


@dataclass
class _Node:
    """A node while it is there, and what it did when it was there before."""

    type: NodeType
    size: int
    """Workers that it has room for."""
    stays: bool
    """It is there from the start, and does not go."""
    free: int = 0
    asked: float = 0.0
    ready: float = 0.0
    idle: float = math.inf
    """Since when it has no work; infinite while it has."""
    seconds: float = 0.0
    booting: float = 0.0
    leaving: float = 0.0
    busy: float = 0.0
    """Seconds of its workers, the start of their processes included."""


class _Fleet:
    """The nodes of a cluster: they come when they are asked for, and go after a time without work."""

    def __init__(self, cluster: Cluster, bundle: Mapping[str, float], boot: float) -> None:
        self.boot, self.timeout = boot, cluster.idle_seconds
        seen: Counter[str] = Counter()
        self.nodes: list[_Node] = []
        for one in cluster.nodes_for(bundle):
            seen[one.name] += 1
            stays = one is cluster.head or seen[one.name] <= one.min_nodes
            self.nodes.append(
                _Node(one, one.holds(bundle), stays, free=one.holds(bundle), idle=0.0 if stays else -math.inf)
            )

    def _gone(self, node: _Node, now: float) -> bool:
        return not node.stays and now > node.idle + self.timeout

    def workers(self, need: Need) -> int:
        """That a trial has: as many as it may have and there is room for."""
        return min(need.most, sum(node.size for node in self.nodes))

    def take(self, workers: int, apart: bool, now: float) -> tuple[float, list[_Node]]:
        """Places for the workers of a trial, each on a node of its own or not, and when the last of them is ready."""
        # Whole on one node, rather one that is there, rather one with no more room than needed; else on the emptiest.
        together = 1 if apart else workers
        there = sorted(
            self.nodes,
            key=lambda node: (
                node.free < together,
                self._gone(node, now),
                node.free if together <= node.free and not apart else -node.free,
            ),
        )
        places: list[_Node] = []
        for node in there:
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
        if math.isinf(node.idle):  # it never came
            return
        node.seconds += node.idle + self.timeout - node.asked
        node.booting += node.ready - node.asked
        node.leaving += self.timeout

    def give(self, places: Sequence[_Node], began: float, now: float) -> None:
        """The workers of a trial that began then have ended."""
        for node in places:
            node.free += 1
            node.busy += now - began
            if node.free == node.size:
                node.idle = now

    def close(self, now: float) -> float:
        """Nothing more is to be done: the time when the last node goes; those that stay are counted until then."""
        last = max([now, *(node.idle + self.timeout for node in self.nodes if not node.stays)])
        for node in self.nodes:
            if node.stays:
                node.seconds = last
            else:
                self._leave(node)
        return last


class _Work(Protocol):
    """Trials that are to be run."""

    def next(self) -> int | None:
        """The number of a trial to begin or to go on with; None if there is none, for now."""

    def goes_on(self, number: int, seconds: float) -> bool:
        """Told of an epoch that a trial finished, and what it took, whether the trial goes on."""


class _Search:
    """The trials of a search. How good one is, is drawn once; it begins where it was paused."""

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
        if again := self.asha.promoted(self.records[number] for number in self.paused):
            self.paused.discard(again.number)
            return again.number
        number = len(self.records)
        if number == self.experiment.search.trials:
            return None
        setting = self.experiment.reference if number == 0 else {"number": number, **self._stratum()}
        self.records.append(TrialRecord(number, "running", setting, (), (), None, {}, {}))
        return number

    def _stratum(self) -> dict[str, Scalar]:
        name = self.experiment.search.stratify
        return {name: self.chance.choice(self.experiment.space[name].values or ())} if name else {}

    def _drawn(self, number: int) -> dict[str, float]:
        """How good a trial is by each objective."""
        lift = 0.0 if self.experiment.search.sampler in STRANGERS else LEARNING * math.log1p(number)
        signs = {name: 1 if way == "max" else -1 for name, way in self.experiment.objective.items()}
        return {name: sign * (self.chance.random() + lift) for name, sign in signs.items()}

    def goes_on(self, number: int, seconds: float) -> bool:
        record = self.records[number]
        values = record.history[-1] if record.history else self._drawn(number)
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


class _Again:
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


def _play(work: _Work, fleet: _Fleet, need: Need, limit: int | None, pace: Pace, now: float) -> float:
    """Run trials, so many at once as there is room for, from `now` on; the time at which the last has ended."""
    fits, workers = trials_that_fit([node.type for node in fleet.nodes], need), fleet.workers(need)
    at_once = min(fits, limit or fits)
    running: list[_Running] = []
    started = 0
    while True:
        while len(running) < at_once and (number := work.next()) is not None:
            began, places = fleet.take(workers, need.apart, now)
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


def play(experiment: Experiment, cluster: Cluster, pace: Pace, seed: int) -> Course:
    """One run of the whole, of many that are possible.

    Args:
        experiment: what is run.
        cluster: where; a trial fits into it, and nothing runs on it yet.
        pace: how long things take.
        seed: of what is left to chance.
    """
    bundle, limit = experiment.resources.bundle, experiment.resources.concurrent
    need, need_again = (
        experiment.resources.need(of) for of in (experiment.resources.workers, experiment.resources.retrain_workers)
    )
    fleet = _Fleet(cluster, bundle, pace.boot)
    search = _Search(experiment, bundle, random.Random(seed))
    ended = _play(search, fleet, need, limit, pace, 0.0)
    best = min(experiment.winner.candidates, search.complete)
    rest = _Again(best * experiment.winner.seeds, experiment.base.epochs)
    again = replace(pace, epoch=pace.epoch * fleet.workers(need) / fleet.workers(need_again))
    last = _play(rest, fleet, need_again, limit, again, ended)
    gone = fleet.close(last)
    nodes: dict[str, float] = defaultdict(float)
    for node in fleet.nodes:
        nodes[node.type.name] += node.seconds
    nodes[cluster.head.name] = gone
    booting, leaving = sum(node.booting for node in fleet.nodes), sum(node.leaving for node in fleet.nodes)
    waiting = sum(node.seconds - node.booting - node.leaving - node.busy / node.size for node in fleet.nodes)
    times, epochs = (ended, last - ended), (search.epochs, rest.epochs)
    return Course(*times, epochs, (search.busy, rest.busy), nodes, booting, waiting, leaving)


def epoch_seconds(folder: Path) -> float:
    """The median time of an epoch over a search, between the reports of two after another.

    Args:
        folder: of a run, such as `grainmill-runs/demo/run-1`.
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
        study = optuna.load_study(study_name=STUDY, storage=optuna.storages.RDBStorage(f"sqlite:///{file.absolute()}"))
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

"""Asynchronous successive halving (ASHA): which trials go on at which epoch.

ASHA is arXiv:1810.05934. With several objectives, trials are ranked by non-domination (arXiv:2106.12639).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from grainmill.config.experiment import Experiment
from grainmill.config.validation import HOURS
from grainmill.search import pareto
from grainmill.search.records import TrialRecord

Verdict = Literal["continue", "stop", "pause"]
Place = tuple[int, object]
"""Epoch of a rung, and stratum."""


class ASHA:
    """Rungs: epochs at which a trial is compared with the trials of its stratum that reached the rung before.

    The rungs are at `grace_epochs` times powers of `reduction`. Of N trials at a rung, the best N / `reduction` go on
    (at least one). The first trial, the published setting, always goes on, so that others can be compared with it.
    """

    def __init__(self, experiment: Experiment, records: Iterable[TrialRecord] = ()) -> None:
        """
        Args:
            experiment: its objective, epochs and search; `scheduler: none` has no rungs.
            records: trials that were judged before; a run that is carried on compares with them, too.
        """
        search, epochs = experiment.search, experiment.base.epochs
        self.experiment, self.reference = experiment, experiment.reference
        grace = search.grace_epochs or math.ceil(epochs / 3)
        self.levels: list[int] = []
        while search.scheduler == "asha" and grace < epochs:
            self.levels.append(grace)
            grace *= search.reduction
        self._points: dict[Place, dict[int, Sequence[float]]] = defaultdict(dict)  # by trial number
        self._ranks: dict[Place, dict[int, int]] = {}
        for record in records:
            for row in record.history:
                self._enter(record, int(row["epoch"]))

    def judge(self, record: TrialRecord) -> Verdict:
        """Decide whether a trial goes on after the epoch that it finished last; each epoch must be judged once."""
        epoch = int(record.metrics["epoch"])
        if not self._enter(record, epoch) or record.setting == self.reference or self._is_good(record, epoch):
            return "continue"
        return self.experiment.search.losers

    def promoted(self, paused: Iterable[TrialRecord]) -> TrialRecord | None:
        """The paused trial, at the highest rung, that is now among the best of its rung; None if there is none."""
        good = [record for record in paused if self._is_good(record, int(record.metrics["epoch"]))]
        return max(good, key=lambda record: record.metrics["epoch"], default=None)

    def _enter(self, record: TrialRecord, epoch: int) -> bool:
        """Enter a trial at the rung of an epoch; returns False if there is no rung."""
        if epoch not in self.levels:
            return False
        metrics = next(row for row in reversed(record.history) if row["epoch"] == epoch)
        place = epoch, self._stratum(record)
        if record.number not in self._points[place]:
            self._points[place][record.number] = self.experiment.point(metrics)
            self._ranks.pop(place, None)
        return True

    def _is_good(self, record: TrialRecord, epoch: int) -> bool:
        place, reduction = (epoch, self._stratum(record)), self.experiment.search.reduction
        points = self._points[place]
        if place not in self._ranks:
            numbers = list(points)
            order = pareto.order(list(points.values())) if points else ()
            self._ranks[place] = {numbers[index]: rank for rank, index in enumerate(order)}
        rank = self._ranks[place].get(record.number)
        return rank is not None and rank * reduction < max(len(points), reduction)

    def _stratum(self, record: TrialRecord) -> object:
        name = self.experiment.search.stratify
        return record.setting[name] if name else None


def expected_epochs(experiment: Experiment) -> float:
    """Epochs of all trials of a search together, if exactly the share 1 / `reduction` goes on at each rung."""
    search, epochs = experiment.search, experiment.base.epochs
    levels = ASHA(experiment).levels
    rest = sum(
        (end - start) / search.reduction**rung
        for rung, (start, end) in enumerate(zip([0, *levels], [*levels, epochs], strict=True))
    )
    return epochs + (search.trials - 1) * rest  # the first trial runs to its end


def forecast(experiment: Experiment, record: TrialRecord) -> str:
    """Cost of the whole search in words, if each epoch of each trial costs as much as those of `record`."""
    share = expected_epochs(experiment) / record.metrics["epoch"] / 3600
    hours = [f"{record.cost[name] * share:.3g} {unit}" for name, unit in HOURS.items() if record.cost.get(name)]
    return f"by trial {record.number}, all {experiment.search.trials} take about {' and '.join(hours)}"

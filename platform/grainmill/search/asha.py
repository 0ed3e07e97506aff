"""Asynchronous successive halving by one objective or by several: which trials go on at which epoch.

ASHA (arXiv:1810.05934), with ranking by non-domination where there are several objectives (arXiv:2106.12639).
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
"""A rung's epoch, and the stratum."""


class ASHA:
    """The rungs: epochs at which a trial is judged among those of its stratum that got there before.

    The rungs are at `grace_epochs` times powers of `reduction`. Of N trials at a rung the best N / `reduction`, at
    least one, go on. The first trial, the published setting, always does, so that all can be held against it.
    """

    def __init__(self, experiment: Experiment, records: Iterable[TrialRecord] = ()) -> None:
        """
        Args:
            experiment: its objective, epochs and search; `scheduler: none` has no rungs.
            records: trials that were judged before: a run that is carried on judges by them, too.
        """
        search, epochs = experiment.search, experiment.base.epochs
        self.experiment, self.reference = experiment, experiment.reference
        grace = search.grace_epochs or math.ceil(epochs / 3)
        self.levels: list[int] = []
        while search.scheduler == "asha" and grace < epochs:
            self.levels.append(grace)
            grace *= search.reduction
        self._at: dict[Place, dict[int, Sequence[float]]] = defaultdict(dict)
        self._positions: dict[Place, dict[int, int]] = {}
        for record in records:
            for row in record.history:
                self._enter(record, int(row["epoch"]))

    def judge(self, record: TrialRecord) -> Verdict:
        """Whether a trial goes on after the epoch that it has just finished; each epoch must be shown once."""
        epoch = int(record.metrics["epoch"])
        if not self._enter(record, epoch) or record.setting == self.reference or self._good(record, epoch):
            return "continue"
        return self.experiment.search.losers

    def promoted(self, paused: Iterable[TrialRecord]) -> TrialRecord | None:
        """A paused trial that is now among the best of its rung, of the highest rung first; None without one."""
        good = [record for record in paused if self._good(record, int(record.metrics["epoch"]))]
        return max(good, key=lambda record: record.metrics["epoch"], default=None)

    def _enter(self, record: TrialRecord, epoch: int) -> bool:
        """Note a trial at a rung; False where there is none."""
        if epoch not in self.levels:
            return False
        metrics = next(row for row in reversed(record.history) if row["epoch"] == epoch)
        place = epoch, self._stratum(record)
        if record.number not in self._at[place]:
            self._at[place][record.number] = self.experiment.point(metrics)
            self._positions.pop(place, None)
        return True

    def _good(self, record: TrialRecord, epoch: int) -> bool:
        place, reduction = (epoch, self._stratum(record)), self.experiment.search.reduction
        here = self._at[place]
        if place not in self._positions:
            numbers = list(here)
            order = pareto.order(list(here.values())) if here else ()
            self._positions[place] = {numbers[index]: position for position, index in enumerate(order)}
        position = self._positions[place].get(record.number)
        return position is not None and position * reduction < max(len(here), reduction)

    def _stratum(self, record: TrialRecord) -> object:
        name = self.experiment.search.stratify
        return record.setting[name] if name else None


def expected_epochs(experiment: Experiment) -> float:
    """Epochs that all trials of a search take together, if at each rung just its share goes on."""
    search, epochs = experiment.search, experiment.base.epochs
    levels = ASHA(experiment).levels
    # The first trial runs to its end.
    rest = sum(
        (end - start) / search.reduction**rung
        for rung, (start, end) in enumerate(zip([0, *levels], [*levels, epochs], strict=True))
    )
    return epochs + (search.trials - 1) * rest


def forecast(experiment: Experiment, record: TrialRecord) -> str:
    """What all trials of a search cost together if each epoch costs what those of one trial did, in words."""
    share = expected_epochs(experiment) / record.metrics["epoch"] / 3600
    hours = [f"{record.cost[name] * share:.3g} {unit}" for name, unit in HOURS.items() if record.cost.get(name)]
    return f"by trial {record.number}, all {experiment.search.trials} take about {' and '.join(hours)}"

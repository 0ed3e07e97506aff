"""The honest winner: the best trials, trained again from fresh seeds, and the choice among them by a stated rule."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy import stats

from grainmill.config.experiment import Experiment
from grainmill.search import pareto
from grainmill.search.records import TrialRecord

LEVEL = 0.95
"""Of the intervals."""


class Entry(NamedTuple):
    """A point that a search reached."""

    record: TrialRecord
    variant: str | None
    """Other settings at which the trained network was evaluated; None: its own."""
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """A metric of a setting, over its trainings."""

    mean: float
    half: float
    """Half the width of its 95 % interval; inf where nothing was trained twice."""

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isinf(self.half) else f"{self.mean:.4f} ± {self.half:.4f}"

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + self.half


@dataclass(frozen=True, repr=False)
class Candidate:
    """One of the best trials, and what came of its setting from fresh seeds."""

    trial: TrialRecord | None
    """Of the search; None where there was none."""
    trainings: Sequence[TrialRecord]
    """Those that ran to their end."""
    estimates: Mapping[str, Estimate]
    """Of every metric that all trainings of all candidates have."""

    def __repr__(self) -> str:
        source = f"trial {self.trial.number}" if self.trial else "base settings"
        return f"Candidate({source}, {len(self.trainings)} trainings)"


def best(experiment: Experiment, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The complete trials, each setting once; inside the constraints first, then by front, then by weight."""
    complete = [record for record in records if record.state == "complete"]
    front = pareto.fronts([experiment.point(record.metrics) for record in complete]) if complete else ()
    keys = {
        record.number: (any(experiment.missed(record.metrics)), number, -_worth(experiment, record.metrics))
        for record, number in zip(complete, front, strict=True)
    }
    found: list[TrialRecord] = []
    for record in sorted(complete, key=lambda record: keys[record.number]):
        if not any(_same(record, other) for other in found):
            found.append(record)
    return found


def front(experiment: Experiment, records: Sequence[TrialRecord]) -> list[Entry]:
    """The Pareto front of all complete trials and their variants; a variant cost what its trial did."""
    complete = [record for record in records if record.state == "complete"]
    entries = [Entry(record, None, record.metrics) for record in complete]
    for record in complete:
        for name, metrics in record.variants.items():
            entries.append(Entry(record, name, {**record.metrics, **metrics}))
    entries = [entry for entry in entries if all(math.isfinite(x) for x in experiment.point(entry.metrics))]
    if not entries:
        return []
    number = pareto.fronts([experiment.point(entry.metrics) for entry in entries])
    return [entry for entry, front in zip(entries, number, strict=True) if front == 0]


def candidates(trials: Sequence[TrialRecord | None], finals: Sequence[TrialRecord]) -> list[Candidate]:
    """The candidates with their estimates; those of which no training came through are left out.

    The intervals are Student's, of a standard deviation that all candidates share: a few seeds of each say little
    about its own.

    Args:
        trials: of the search, or None for the base settings.
        finals: trainings, whose settings are those of a trial and a seed.
    """
    groups = [
        [record for record in finals if record.state == "complete" and (trial is None or _same(record, trial))]
        for trial in trials
    ]
    kept = [record for group in groups for record in group]
    names = [name for name in (kept[0].metrics if kept else ()) if all(name in record.metrics for record in kept)]
    spread = {name: _deviation([[record.metrics[name] for record in group] for group in groups]) for name in names}
    return [
        Candidate(trial, group, {name: _estimate([r.metrics[name] for r in group], *spread[name]) for name in names})
        for trial, group in zip(trials, groups, strict=True)
        if group
    ]


def choose(experiment: Experiment, found: Sequence[Candidate]) -> Candidate:
    """The candidate with the best lower bounds: of the objectives' intervals the poorer ends, weighted and added.

    One whose means lie outside the constraints is chosen only where all do.
    """

    def worth(candidate: Candidate) -> tuple[bool, float]:
        means = {name: estimate.mean for name, estimate in candidate.estimates.items()}
        poor = {
            name: estimate.mean
            if math.isinf(estimate.half)
            else (estimate.low if experiment.objective.get(name) == "max" else estimate.high)
            for name, estimate in candidate.estimates.items()
        }
        return not any(experiment.missed(means)), _worth(experiment, poor)

    return max(found, key=worth)


def shipped(experiment: Experiment, candidate: Candidate) -> TrialRecord:
    """The training whose model is kept: that with the best weighted objectives."""
    return max(candidate.trainings, key=lambda record: _worth(experiment, record.metrics))


def _same(one: TrialRecord, other: TrialRecord) -> bool:
    """Whether two trials have the same setting but for the seed."""
    names = (one.setting.keys() | other.setting.keys()) - {"seed"}
    return all(one.setting.get(name) == other.setting.get(name) for name in names)


def _worth(experiment: Experiment, metrics: Mapping[str, float]) -> float:
    weights = experiment.winner.weights
    values = experiment.point(metrics)
    return sum(weights.get(name, 1) * value for name, value in zip(experiment.objective, values, strict=True))


def _deviation(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The standard deviation inside the groups, and its degrees of freedom."""
    freedom = sum(len(group) - 1 for group in groups if group)
    squares = sum((value - statistics.fmean(group)) ** 2 for group in groups for value in group)
    return math.sqrt(squares / freedom) if freedom else math.inf, freedom


def _estimate(values: Sequence[float], deviation: float, freedom: int) -> Estimate:
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * deviation / math.sqrt(len(values)) if freedom else math.inf
    return Estimate(statistics.fmean(values), half)

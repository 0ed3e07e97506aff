"""Choice of the winner: the best trials are trained again from fresh seeds and compared by a stated rule."""

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
"""Confidence level of the intervals."""


class Entry(NamedTuple):
    """A complete trial, or one of its variants, as a point of the objectives."""

    record: TrialRecord
    variant: str | None
    """Name of the other evaluation settings; None for the trial's own."""
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """Mean of a metric over several trainings of one setting."""

    mean: float
    half: float
    """Half the width of the 95 % interval; inf if no setting was trained twice."""

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isinf(self.half) else f"{self.mean:.4f} ± {self.half:.4f}"

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half


@dataclass(frozen=True, repr=False)
class Candidate:
    """A trial among the best, and the new trainings of its setting from fresh seeds."""

    trial: TrialRecord | None
    """The trial of the search; None for the base settings."""
    trainings: Sequence[TrialRecord]
    """New trainings that ran to their end."""
    estimates: Mapping[str, Estimate]
    """Estimate of each metric that all trainings of all candidates have."""

    def __repr__(self) -> str:
        source = f"trial {self.trial.number}" if self.trial else "base settings"
        return f"Candidate({source}, {len(self.trainings)} trainings)"


def best(experiment: Experiment, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The complete trials, each setting once, ordered by constraints, then by front, then by weighted sum."""
    complete = [record for record in records if record.state == "complete"]
    numbers = pareto.fronts([experiment.point(record.metrics) for record in complete]) if complete else ()
    keys = {
        record.number: (any(experiment.violations(record.metrics)), front, -_weighted(experiment, record.metrics))
        for record, front in zip(complete, numbers, strict=True)
    }
    distinct: list[TrialRecord] = []
    for record in sorted(complete, key=lambda record: keys[record.number]):
        if not any(_same_setting(record, other) for other in distinct):
            distinct.append(record)
    return distinct


def entries(records: Sequence[TrialRecord]) -> list[Entry]:
    """The complete trials, then their variants."""
    complete = [record for record in records if record.state == "complete"]
    return [Entry(record, None, record.metrics) for record in complete] + [
        Entry(record, variant, {**record.metrics, **metrics})
        for record in complete
        for variant, metrics in record.variants.items()
    ]


def front(experiment: Experiment, records: Sequence[TrialRecord]) -> list[Entry]:
    """Complete trials and variants that no other dominates; constraints play no part."""
    finite = [one for one in entries(records) if all(map(math.isfinite, experiment.point(one.metrics)))]
    numbers = pareto.fronts([experiment.point(one.metrics) for one in finite]) if finite else ()
    return [one for one, number in zip(finite, numbers, strict=True) if number == 0]


def candidates(trials: Sequence[TrialRecord | None], finals: Sequence[TrialRecord]) -> list[Candidate]:
    """The candidates with their estimates, without those of which no training ran to its end.

    The intervals are Student's, with a standard deviation that all candidates share: the few seeds of one candidate say
    little about its own.

    Args:
        trials: trials of the search, or None for the base settings.
        finals: trainings, each with the setting of a trial and a seed.
    """
    groups = [
        [record for record in finals if record.state == "complete" and (trial is None or _same_setting(record, trial))]
        for trial in trials
    ]
    complete = [record for group in groups for record in group]
    names = [name for name in (complete[0].metrics if complete else ()) if all(name in one.metrics for one in complete)]
    spread = {name: _deviation([[record.metrics[name] for record in group] for group in groups]) for name in names}
    return [
        Candidate(trial, group, {name: _estimate([r.metrics[name] for r in group], *spread[name]) for name in names})
        for trial, group in zip(trials, groups, strict=True)
        if group
    ]


def choose(experiment: Experiment, found: Sequence[Candidate]) -> Candidate:
    """The candidate with the largest weighted sum of the objectives, at the poorer end of each interval.

    A candidate whose means lie outside the constraints is chosen only if all candidates do.
    """

    def key(candidate: Candidate) -> tuple[bool, float]:
        means = {name: estimate.mean for name, estimate in candidate.estimates.items()}
        poor = {
            name: estimate.mean
            if math.isinf(estimate.half)
            else (estimate.low if experiment.objective.get(name) == "max" else estimate.high)
            for name, estimate in candidate.estimates.items()
        }
        return not any(experiment.violations(means)), _weighted(experiment, poor)

    return max(found, key=key)


def shipped(experiment: Experiment, candidate: Candidate) -> TrialRecord:
    """The training whose model is registered: the one with the largest weighted sum of the objectives."""
    return max(candidate.trainings, key=lambda record: _weighted(experiment, record.metrics))


def _same_setting(one: TrialRecord, other: TrialRecord) -> bool:
    """Return True when two trials have the same setting, whatever their seeds."""
    names = (one.setting.keys() | other.setting.keys()) - {"seed"}
    return all(one.setting.get(name) == other.setting.get(name) for name in names)


def _weighted(experiment: Experiment, metrics: Mapping[str, float]) -> float:
    weights, values = experiment.winner.weights, experiment.point(metrics)
    return sum(weights.get(name, 1) * value for name, value in zip(experiment.objective, values, strict=True))


def _deviation(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within the groups, and its degrees of freedom."""
    freedom = sum(len(group) - 1 for group in groups if group)
    squares = sum((value - statistics.fmean(group)) ** 2 for group in groups for value in group)
    return math.sqrt(squares / freedom) if freedom else math.inf, freedom


def _estimate(values: Sequence[float], deviation: float, freedom: int) -> Estimate:
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * deviation / math.sqrt(len(values)) if freedom else math.inf
    return Estimate(statistics.fmean(values), half)

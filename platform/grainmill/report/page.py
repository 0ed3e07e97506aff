"""Report of a run: one HTML page that holds its charts, and the charts as files next to it."""

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from grainmill.config.experiment import Bound, Experiment
from grainmill.config.space import shown
from grainmill.config.validation import HOURS
from grainmill.registry.models import Version
from grainmill.report import optuna_plots
from grainmill.report.charts import Chart
from grainmill.search import selection
from grainmill.search.records import TrialRecord
from grainmill.search.selection import Candidate
from grainmill.search.study import Study

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


def write(
    folder: Path,
    experiment: Experiment,
    search: Study | None,
    finals: Sequence[TrialRecord],
    candidates: Sequence[Candidate],
    winner: Candidate,
    version: Version,
) -> tuple[Path, list[Path]]:
    """Write `report.html` into the folder of a run, and the charts of its search into `report/` below it.

    Args:
        folder: of the run.
        experiment: its settings.
        search: its study; None if nothing was searched.
        finals: the trainings after the search, or the one training.
        candidates: the best trials with their new trainings.
        winner: the chosen candidate.
        version: the registered model.

    Returns:
        The files of the page and of the charts.
    """
    charts = optuna_plots.charts_of(experiment, search, winner.trial) if search and winner.trial else []
    page, pictures = folder / "report.html", folder / "report"
    page.write_text(html(experiment, search.records if search else (), finals, candidates, winner, version, charts))
    files = []
    for chart in charts:
        if chart.png:
            pictures.mkdir(exist_ok=True)
            files.append(pictures / f"{chart.name}.png")
            files[-1].write_bytes(chart.png)
    return page, files


def html(
    experiment: Experiment,
    records: Sequence[TrialRecord],
    finals: Sequence[TrialRecord],
    candidates: Sequence[Candidate],
    winner: Candidate,
    version: Version,
    charts: Sequence[Chart],
) -> str:
    """Content of the page; `records` are the trials of the search, the other arguments are those of `write`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    goals = ", ".join(experiment.objective)
    return environment.get_template("page.html").render(
        name=experiment.name,
        summary=f"{counted(records or finals)}; the model is {version.uri}, objective {goals}",
        comparison=comparison(experiment, records, winner),
        contest=contest(experiment, candidates, winner) if winner.trial else None,
        rule=rule(experiment, winner),
        charts=charts,
        front=front(experiment, records),
        costs=costs(records, finals),
        saved=saved(experiment, records),
        trials=_trials(experiment, records, winner.trial) if winner.trial else None,
    )


def counted(records: Sequence[TrialRecord]) -> str:
    """Number of trials by the way they ended, in words."""
    counts = {state: sum(record.state == state for record in records) for state in ("complete", "stopped", "failed")}
    plural = "trial" if len(records) == 1 else "trials"
    ended = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    interrupted = sum(bool(record.interruptions) for record in records)
    return f"{len(records)} {plural}: {ended}" + f"; {interrupted} of them interrupted" * (interrupted > 0)


def comparison(experiment: Experiment, records: Sequence[TrialRecord], winner: Candidate) -> Table:
    """Settings and metrics of the published setting, the winner and the winner's new trainings, side by side."""
    columns: dict[str, TrialRecord] = {}
    if winner.trial:
        published = next((record for record in records if record.setting == experiment.reference), None)
        columns = ({"published setting": published} if published else {}) | {"winner": winner.trial}
    header = ["", *columns, "trained again" if winner.trial else "trained"]
    setting = winner.trial.setting if winner.trial else {}
    rows = [
        [name, *(shown(record.setting[name]) for record in columns.values()), shown(value)]
        for name, value in setting.items()
    ]
    # The objectives, then the other scores, all in [0, 1].
    scores = [name for name in winner.estimates if name.startswith("top") or name.endswith("_map")]
    for name in dict.fromkeys([*experiment.objective, *scores]):
        values = [f"{record.metrics[name]:.4f}" if name in record.metrics else "" for record in columns.values()]
        rows.append([name, *values, str(winner.estimates.get(name, ""))])
    return header, rows


def contest(experiment: Experiment, candidates: Sequence[Candidate], winner: Candidate) -> Table:
    """Objectives of the candidates in the search, and when they were trained again."""
    header = ["trial", *(f"{name} {when}" for name in experiment.objective for when in ("in the search", "again")), ""]
    rows = []
    for one in candidates:
        assert one.trial, "candidates come from a search"
        row = [str(one.trial.number)]
        for name in experiment.objective:
            row += [f"{one.trial.metrics[name]:.4f}", str(one.estimates.get(name, ""))]
        rows.append([*row, "winner" * (one == winner)])
    return header, rows


def rule(experiment: Experiment, winner: Candidate) -> str:
    """The rule by which the winner was chosen, in words."""
    asked, objective = experiment.winner, experiment.objective
    goal = " and ".join(f"{'large' if way == 'max' else 'small'} {name}" for name, way in objective.items())
    measure, order = next(iter(objective)), ""
    if len(objective) > 1:
        weights = ", ".join(f"{name} {asked.weights.get(name, 1):g}" for name in objective)
        measure, order = f"the weighted sum of the objectives (weights: {weights})", "Pareto front, then by "
    if experiment.constraints:
        order = f"constraints (those that meet them first), then by {order}"
    trials = f"{asked.candidates} best trials are" if asked.candidates > 1 else "best trial is"
    seeds = f"{asked.seeds} fresh seeds" if asked.seeds > 1 else "a fresh seed"
    values = "the poorer ends of the 95 % intervals" if asked.seeds > 1 else "the values of the new training"
    text = (
        f"Goal: {goal}. All complete trials are ordered by {order}{measure}, and the {trials} trained again from "
        f"{seeds}. The winner is the best of these by {measure}, where {values} count."
    )
    if experiment.constraints:
        bounds = " and ".join(_bound(name, bound) for name, bound in experiment.constraints.items())
        missed = any(experiment.violations({name: estimate.mean for name, estimate in winner.estimates.items()}))
        text += f" A candidate whose means miss a constraint ({bounds}) wins only if all candidates do"
        text += ", as here: the winner misses it." if missed else "; the winner meets them."
    return text


def _bound(name: str, bound: Bound) -> str:
    low = "" if bound.min is None else f"{bound.min:g} ≤ "
    return f"{low}{name}" + ("" if bound.max is None else f" ≤ {bound.max:g}")


def front(experiment: Experiment, records: Sequence[TrialRecord]) -> Table:
    """The Pareto front, the best by the first objective first."""
    first = next(iter(experiment.objective))
    entries = selection.front(experiment, records)
    entries.sort(key=lambda entry: entry.metrics[first], reverse=experiment.objective[first] == "max")
    rows = [
        [str(one.record.number), one.variant or "", *(shown(float(one.metrics[name])) for name in experiment.objective)]
        for one in entries
    ]
    return ["trial", "variant", *experiment.objective], rows


def costs(records: Sequence[TrialRecord], finals: Sequence[TrialRecord]) -> Table:
    """Trainings, epochs and hours by the way the trials ended."""
    groups: dict[str, Sequence[TrialRecord]] = {
        "complete trials": [record for record in records if record.state == "complete"],
        "trials stopped early": [record for record in records if record.state == "stopped"],
        "trials that failed": [record for record in records if record.state not in ("complete", "stopped")],
        "final trainings": finals,
    }
    groups = {name: group for name, group in groups.items() if group} | {"in all": [*records, *finals]}
    rows = []
    for name, group in groups.items():
        epochs = sum(int(record.metrics.get("epoch", 0)) for record in group)
        rows.append([name, str(len(group)), str(epochs), *(_hours(_spent(group, cost)) for cost in HOURS)])
    return ["", "trainings", "epochs", *HOURS.values()], rows


def saved(experiment: Experiment, records: Sequence[TrialRecord]) -> str:
    """Estimate of what early stopping saved, in words; empty if no trial was stopped."""
    stopped = [record for record in records if record.state == "stopped" and record.metrics]
    if not stopped:
        return ""
    left = {record.number: experiment.base.epochs - int(record.metrics["epoch"]) for record in stopped}
    parts = []
    for cost, unit in HOURS.items():
        spent = _spent(records, cost)
        spared = sum(one.cost.get(cost, 0) / one.metrics["epoch"] * left[one.number] for one in stopped)
        if spared:
            share = f"{spared / (spent + spared):.0%} of what the search would have taken"
            parts.append(f"{_hours(spared)} {unit}, {share}")
    hours = f": {'; '.join(parts)}" if parts else ""
    return (
        f"Stopping early saved {sum(left.values())} epochs{hours}. This is an estimate: each stopped trial's cost per "
        "epoch, times the epochs that it did not run."
    )


def _spent(records: Sequence[TrialRecord], cost: str) -> float:
    return sum(record.cost.get(cost, 0) for record in records)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g}"


def _trials(
    experiment: Experiment, records: Sequence[TrialRecord], winner: TrialRecord
) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows and CSS classes of the table of all trials."""
    rows, classes = [], []
    for record in records:
        classes.append("winner" if record == winner else "reference" if record.setting == experiment.reference else "")
        values = [shown(record.metrics.get(name, "")) for name in experiment.objective]
        hours = [_hours(record.cost.get(name, 0)) for name in HOURS]
        setting = [shown(record.setting[name]) for name in experiment.space]
        epoch = str(int(record.metrics.get("epoch", 0)))
        rows.append([str(record.number), _state(experiment, record), epoch, *values, *hours, *setting])
    return ["trial", "state", "epochs", *experiment.objective, *HOURS.values(), *experiment.space], rows, classes


def _state(experiment: Experiment, record: TrialRecord) -> str:
    """The way a trial ended, the cause of a failure, and the epochs at which the trial was interrupted."""
    interrupted = "".join(f"; interrupted {where}" for where in record.interruptions)
    if record.cause:
        return f"{record.state}: {record.cause}{interrupted}"
    outside = record.state == "complete" and any(experiment.violations(record.metrics))
    return record.state + ", outside the constraints" * outside + interrupted

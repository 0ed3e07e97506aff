"""The report of a run: one self-contained HTML page, and its pictures as files beside it."""

import base64
from collections.abc import Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path

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

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1f2933; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e7eb; }}
th:first-child, td:first-child {{ text-align: left; }} thead th {{ border-bottom: 2px solid #9aa5b1; }}
tr.winner td {{ background: #e6f4ea; }} tr.reference td {{ background: #fdf1de; }}
p {{ margin: .4rem 0; max-width: 60rem; }} .key {{ color: #52606d; }} img {{ max-width: 100%; }}
.scroll {{ overflow-x: auto; }}
</style></head><body>
<h1>{title}</h1><p class="key">{summary}</p>{body}</body></html>
"""


def write(
    folder: Path,
    experiment: Experiment,
    search: Study | None,
    finals: Sequence[TrialRecord],
    candidates: Sequence[Candidate],
    chosen: Candidate,
    version: Version,
) -> tuple[Path, list[Path]]:
    """Write `report.html` into a folder, and the pictures of a search into `report/` below it.

    Args:
        folder: of the run.
        experiment: what was run.
        search: its study; None where nothing was searched.
        finals: the trainings after the search, or the one training.
        candidates: the best trials, trained again.
        chosen: the winner among those.
        version: the registered model.

    Returns:
        The files of the page and of the pictures.
    """
    drawn = optuna_plots.pictures(experiment, search, chosen.trial) if search and chosen.trial else []
    page = html(experiment, search.records if search else (), finals, candidates, chosen, version, drawn)
    (folder / "report.html").write_text(page)
    files = []
    for picture in drawn:
        if picture.png:
            files.append(folder / "report" / f"{picture.name}.png")
            files[-1].parent.mkdir(exist_ok=True)
            files[-1].write_bytes(picture.png)
    return folder / "report.html", files


def html(
    experiment: Experiment,
    records: Sequence[TrialRecord],
    finals: Sequence[TrialRecord],
    candidates: Sequence[Candidate],
    chosen: Candidate,
    version: Version,
    pictures: Sequence[Chart],
) -> str:
    """The page; `records` are the trials of the search, the others as in `write`."""
    sections = [_html_table(*comparison(experiment, records, chosen))]
    if chosen.trial:
        sections += [_heading("The best, trained again"), _html_table(*contest(experiment, candidates, chosen))]
        sections.append(_paragraph(rule(experiment, chosen)))
    for picture in pictures:
        sections += [_heading(picture.title), _paragraph(picture.text)]
        if picture.png:
            data = base64.b64encode(picture.png).decode()
            sections.append(f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">')
        if picture.name == "front":
            sections.append(_html_table(*front(experiment, records)))
    sections += [_heading("Cost"), _html_table(*costs(records, finals))]
    if told := saved(experiment, records):
        sections.append(_paragraph(told))
    if chosen.trial:
        sections += [_heading("Trials"), _trials(experiment, records, chosen.trial)]
    counts = counted(records or finals)
    summary = f"{counts}; the model is {escape(version.uri)}, objective {escape(', '.join(experiment.objective))}"
    return _PAGE.format(title=escape(f"Grainmill: {experiment.name}"), summary=summary, body="\n".join(sections))


def counted(records: Sequence[TrialRecord]) -> str:
    """How many trials ended how, in words."""
    counts = {state: sum(record.state == state for record in records) for state in ("complete", "stopped", "failed")}
    plural = "trial" if len(records) == 1 else "trials"
    ended = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    interrupted = sum(bool(record.interruptions) for record in records)
    return f"{len(records)} {plural}: {ended}" + f"; {interrupted} of them interrupted" * (interrupted > 0)


def comparison(experiment: Experiment, records: Sequence[TrialRecord], chosen: Candidate) -> Table:
    """The published setting, the winner and its further trainings, side by side: header and rows."""
    columns: dict[str, TrialRecord] = {}
    if chosen.trial:
        published = next((record for record in records if record.setting == experiment.reference), None)
        columns = ({"published setting": published} if published else {}) | {"winner": chosen.trial}
    header = ["", *columns, "trained again" if chosen.trial else "trained"]
    setting = chosen.trial.setting if chosen.trial else {}
    rows = [
        [name, *(shown(record.setting[name]) for record in columns.values()), shown(value)]
        for name, value in setting.items()
    ]
    for name in metric_names(experiment, chosen):
        values = [f"{record.metrics[name]:.4f}" if name in record.metrics else "" for record in columns.values()]
        rows.append([name, *values, _estimated(chosen, name)])
    return header, rows


def contest(experiment: Experiment, candidates: Sequence[Candidate], chosen: Candidate) -> Table:
    """The candidates, by what they reached in the search and when they were trained again: header and rows."""
    header = ["trial", *(f"{name} {when}" for name in experiment.objective for when in ("in the search", "again")), ""]
    rows = []
    for one in candidates:
        assert one.trial, "candidates come from a search"
        cells = [(f"{one.trial.metrics[name]:.4f}", _estimated(one, name)) for name in experiment.objective]
        rows.append([str(one.trial.number), *(cell for pair in cells for cell in pair), "winner" * (one == chosen)])
    return header, rows


def rule(experiment: Experiment, chosen: Candidate) -> str:
    """How the winner was chosen, in words."""
    asked, several = experiment.winner, len(experiment.objective) > 1
    goal = " and ".join(f"{'large' if way == 'max' else 'small'} {name}" for name, way in experiment.objective.items())
    weights = ", ".join(f"{name} {asked.weights.get(name, 1):g}" for name in experiment.objective)
    measure = (
        f"the weighted sum of the objectives (weights: {weights})" if several else next(iter(experiment.objective))
    )
    places = "Pareto front, then by " if several else ""
    first = "those inside the constraints first, then by " if experiment.constraints else "by "
    trials = f"the {asked.candidates} best trials are" if asked.candidates > 1 else "the best trial is"
    seeds = f"{asked.seeds} fresh seeds" if asked.seeds > 1 else "a fresh seed"
    ends = "the poorer ends of the 95 % intervals count" if asked.seeds > 1 else "the values of the new training count"
    text = (
        f"The rule, for {goal}: of all complete trials, {first}{places}{measure}, {trials} trained again from {seeds}. "
    )
    text += f"The winner is the best of these by {measure}, of which {ends}."
    if experiment.constraints:
        bounds = " and ".join(_bound(name, bound) for name, bound in experiment.constraints.items())
        text += f" One whose means miss a constraint ({bounds}) wins only where all do"
        missed = any(experiment.missed({name: found.mean for name, found in chosen.estimates.items()}))
        text += ", which is so here: the winner misses it." if missed else "; the winner keeps them."
    return text


def _bound(name: str, bound: Bound) -> str:
    low = "" if bound.min is None else f"{bound.min:g} ≤ "
    return f"{low}{name}" + ("" if bound.max is None else f" ≤ {bound.max:g}")


def front(experiment: Experiment, records: Sequence[TrialRecord]) -> Table:
    """The Pareto front: header and rows, the best by the first objective first."""
    first = next(iter(experiment.objective))
    best = selection.front(experiment, records)
    best.sort(key=lambda entry: entry.metrics[first], reverse=experiment.objective[first] == "max")
    rows = [
        [str(one.record.number), one.variant or "", *(shown(float(one.metrics[name])) for name in experiment.objective)]
        for one in best
    ]
    return ["trial", "variant", *experiment.objective], rows


def costs(records: Sequence[TrialRecord], finals: Sequence[TrialRecord]) -> Table:
    """What was spent on what: header and rows."""
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
    """What stopping early saved, in words; empty where nothing was stopped."""
    stopped = [record for record in records if record.state == "stopped" and record.metrics]
    if not stopped:
        return ""
    epochs = experiment.base.epochs
    missing = sum(epochs - int(record.metrics["epoch"]) for record in stopped)
    parts = []
    for cost, unit in HOURS.items():
        spent = _spent(records, cost)
        spared = sum(
            record.cost.get(cost, 0) / record.metrics["epoch"] * (epochs - record.metrics["epoch"])
            for record in stopped
        )
        if spared:
            parts.append(
                f"{_hours(spared)} {unit}, {spared / (spent + spared):.0%} of what the search would have taken"
            )
    what = f": {'; '.join(parts)}" if parts else ""
    return (
        f"Stopping early saved {missing} epochs{what}. This is an estimate: each stopped trial's cost per epoch, times "
        "the epochs that it did not run."
    )


def _spent(records: Sequence[TrialRecord], cost: str) -> float:
    return sum(record.cost.get(cost, 0) for record in records)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g}"


def _estimated(candidate: Candidate, name: str) -> str:
    """Mean and half the width of the 95 % interval."""
    return str(candidate.estimates.get(name, ""))


def metric_names(experiment: Experiment, candidate: Candidate) -> list[str]:
    """The objectives, then the other metrics that every trial is judged by: those in [0, 1] named for a score."""
    others = [name for name in candidate.estimates if name.startswith("top") or name.endswith("_map")]
    return list(dict.fromkeys([*experiment.objective, *others]))


def _heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def _paragraph(text: str) -> str:
    return f'<p class="key">{escape(text)}</p>'


def _html_table(header: Sequence[str], rows: Sequence[Sequence[object]], kinds: Sequence[str] = ()) -> str:
    """HTML; kinds are the rows' CSS classes."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = [
        f'<tr class="{kind}">' + "".join(f"<td>{escape(shown(cell))}</td>" for cell in cells) + "</tr>"
        for cells, kind in zip_longest(rows, kinds, fillvalue="")
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _trials(experiment: Experiment, records: Sequence[TrialRecord], best: TrialRecord) -> str:
    rows, kinds = [], []
    for record in records:
        kinds.append("winner" if record == best else "reference" if record.setting == experiment.reference else "")
        values = [record.metrics.get(name, "") for name in experiment.objective]
        spent = [_hours(record.cost.get(name, 0)) for name in HOURS]
        epoch = int(record.metrics.get("epoch", 0))
        rows.append(
            [
                record.number,
                _state(experiment, record),
                epoch,
                *values,
                *spent,
                *(record.setting[name] for name in experiment.space),
            ]
        )
    return _html_table(
        ["trial", "state", "epochs", *experiment.objective, *HOURS.values(), *experiment.space], rows, kinds
    )


def _state(experiment: Experiment, record: TrialRecord) -> str:
    """How a trial ended, with the cause of a failure, and where it was cut short before."""
    interrupted = "".join(f"; interrupted {where}" for where in record.interruptions)
    if record.cause:
        return f"{record.state}: {record.cause}{interrupted}"
    outside = record.state == "complete" and any(experiment.missed(record.metrics))
    return record.state + ", outside the constraints" * outside + interrupted

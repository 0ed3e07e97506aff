"""Optuna's pictures of a search: its parameters and its timeline; and all pictures, in order."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy

import matplotlib
import optuna
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as optunas

from grainmill.config.experiment import Experiment
from grainmill.report import charts
from grainmill.report.charts import COLOURS, Chart, Subject
from grainmill.search.records import TrialRecord
from grainmill.search.study import Study

FEWEST = 3
"""Complete trials from which anything is said of the parameters."""
PAIR = ("loss.weight", "model.p")
"""Parameters whose map is drawn where both are searched."""


def charts_of(experiment: Experiment, study: Study, best: TrialRecord) -> list[Chart]:
    """All pictures of a search, in the order of the report.

    Args:
        experiment: what was searched.
        study: the search.
        best: its winner.
    """
    stored = optuna.load_study(study_name=study.name, storage=study.url)
    trials = [trial for trial in stored.get_trials(deepcopy=False) if "setting" in trial.user_attrs]
    subject = Subject(experiment, study.records, best)
    made = [charts.front(subject)] if len(experiment.objective) > 1 else []
    made.append(charts.curves(subject))
    if experiment.space:
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        made += [charts.space(subject), _importances(subject, complete)]
        made += [_coordinates(subject, complete), _contour(subject, complete)]
    return [*made, _timeline(subject, trials)]


def _study(subject: Subject, trials: Sequence[FrozenTrial], objectives: int, negated: bool = False) -> optuna.Study:
    """A study in memory of the first objectives; negated, smaller is better in all of them."""
    ways = list(subject.experiment.objective.values())[:objectives]
    made = optuna.create_study(
        directions=["minimize" if negated or way == "min" else "maximize" for way in ways],
        sampler=optuna.samplers.RandomSampler(),
    )
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        made.set_metric_names(list(subject.experiment.objective)[:objectives])
    for trial in trials:
        taken = copy(trial)
        if trial.state == TrialState.COMPLETE:
            values = trial.values[:objectives]
            taken.values = [-x if negated and way == "max" else x for x, way in zip(values, ways, strict=True)]
        made.add_trial(taken)
    return made


@contextmanager
def _drawing() -> Iterator[None]:
    """Optuna draws through pyplot, in a style of its own; without a window, and what it changes is put back."""
    from matplotlib import pyplot

    before = matplotlib.rcParams.copy()["backend"]  # of a copy: the original would look for a window system
    figures = pyplot.get_fignums()
    # Warnings: Optuna's, that all this is experimental; Matplotlib's, of a parameter that had a single value.
    with matplotlib.rc_context(), warnings.catch_warnings(action="ignore"):
        pyplot.switch_backend("agg")
        try:
            yield
        finally:
            for number in set(pyplot.get_fignums()) - set(figures):
                pyplot.close(number)
            if isinstance(before, str):  # else nobody has chosen one
                pyplot.switch_backend(before)


def _tidied(drawn: Axes, height: float) -> Figure:
    """Optuna's figure in the looks of the others; the report has the title."""
    figure = drawn.figure
    assert isinstance(figure, Figure), "not a part of one"
    # A colour bar that was made without a layout stays without one.
    figure.set(size_inches=(10, height), facecolor="white", layout_engine="none" if figure.axes[1:] else "constrained")
    for ax in figure.axes:
        for place in ("left", "center"):
            ax.set_title("", loc=place)
        ax.set_facecolor("white")
        ax.grid(False)
    return figure


def _missing(complete: Sequence[FrozenTrial]) -> str | None:
    """Why nothing can be said of the parameters, if so."""
    if len(complete) < FEWEST:
        return f"left out: it takes {FEWEST} complete trials, got {len(complete)}"
    drawn = {name for trial in complete for name in trial.params}
    if len(drawn) < 2:
        return f"left out: it takes 2 searched parameters, got {len(drawn)} in complete trials"
    return None


def _importances(subject: Subject, complete: Sequence[FrozenTrial]) -> Chart:
    name, title, objectives = "importances", "Importance of the parameters", len(subject.experiment.objective)
    if reason := _missing(complete):
        return Chart(name, title, reason, None)
    # Of several objectives Optuna calls the parameters important that make each small.
    study = _study(subject, complete, objectives, negated=True)
    with _drawing(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ax = optunas.plot_param_importances(study)
        if any("will be equal" in str(warning.message) for warning in caught):
            return Chart(name, title, "left out: the complete trials are equally good, or nearly all are", None)
        figure = _tidied(ax, 1.5 + 0.28 * objectives * len(ax.get_yticks()))
        ax.grid(axis="x", alpha=0.3)
        ax.set(xlabel="importance (a share of 1)", ylabel="")
        data = charts.png(figure)
    few = "" if len(complete) >= 50 else f" {len(complete)} complete trials give no more than a hint."
    text = "What sets the best tenth of the complete trials apart from the others (PED-ANOVA)." + few
    return Chart(name, title, text, data)


def _coordinates(subject: Subject, complete: Sequence[FrozenTrial]) -> Chart:
    name, title, objectives = "coordinates", "Parallel coordinates", len(subject.experiment.objective)
    if reason := _missing(complete):
        return Chart(name, title, reason, None)
    study = _study(subject, complete, objectives)
    with _drawing():
        ax = optunas.plot_parallel_coordinate(study, target_name=next(iter(subject.experiment.objective)))
        for lines in ax.collections:  # Optuna's fade to white
            lines.set(cmap="viridis" if lines.get_cmap().name.endswith("_r") else "viridis_r", linewidth=1.6, alpha=0.8)
        data = charts.png(_tidied(ax, 5))
    return Chart(name, title, "Each line is a complete trial; None stands where a parameter was not drawn.", data)


def _contour(subject: Subject, complete: Sequence[FrozenTrial]) -> Chart:
    """The first objective over two parameters."""
    name, title, metric = "contour", "Map of two parameters", next(iter(subject.experiment.objective))
    if reason := _missing(complete):
        return Chart(name, title, reason, None)
    study = _study(subject, complete, 1)
    pair = _pair(study, complete)
    if len(pair) < 2:
        return Chart(name, title, "left out: it takes 2 numeric parameters of which trials tried 2 values", None)
    (x, y), space = pair, subject.experiment.space
    if (both := sum({x, y} <= trial.params.keys() for trial in complete)) < FEWEST:
        reason = f"left out: it takes {FEWEST} complete trials that searched {x} and {y}, got {both}"
        return Chart(name, title, reason, None)
    with _drawing():
        ax = optunas.plot_contour(study, [x, y], target_name=metric)
        for kind in ("published setting", "winner"):
            for record in subject.complete:
                if subject.kind(record) == kind and all(space[one].active(record.setting) for one in pair):
                    at = (record.setting[ax.get_xlabel()], record.setting[ax.get_ylabel()])
                    ax.plot(*at, "*", ms=17, mec="white", color=COLOURS[kind], label=kind, zorder=10)
        ax.legend(loc="upper left", bbox_to_anchor=(0, 1.12), ncols=2, frameon=False)
        data = charts.png(_tidied(ax, 5.5))
    return Chart(name, f"{title}: {x} and {y}", f"{metric}, interpolated between the complete trials (dots).", data)


def _pair(study: optuna.Study, complete: Sequence[FrozenTrial]) -> tuple[str, ...]:
    """The two parameters of the map: `PAIR`, or the most important numeric ones."""
    values: dict[str, set[object]] = {}
    for trial in complete:
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(value)
    numeric = [
        name
        for name, tried in values.items()
        if len(tried) > 1 and all(isinstance(one, int | float) and not isinstance(one, bool) for one in tried)
    ]
    if set(PAIR) <= set(numeric):
        return PAIR
    with warnings.catch_warnings(action="ignore"):  # of few trials; any two will do then
        important = optuna.importance.get_param_importances(study)
    return tuple([name for name in important if name in numeric][:2])


def _timeline(subject: Subject, trials: Sequence[FrozenTrial]) -> Chart:
    with _drawing():
        ax = optunas.plot_timeline(_study(subject, trials, len(subject.experiment.objective)))
        for bar, record in zip(ax.patches, subject.records, strict=True):
            bar.set(facecolor=COLOURS[subject.kind(record)], y=record.number - bar.get_height() / 2)
        ax.get_legend().remove()
        ax.invert_yaxis()
        figure = _tidied(ax, min(8, 1.6 + 0.2 * len(trials)))
        ax.grid(axis="x", alpha=0.3)
        locator = AutoDateLocator()
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        ax.tick_params(axis="x", rotation=0)
        ax.set(xlabel="time", ylabel="trial")
        charts.legend(figure, charts.kinds(subject, ""))
        data = charts.png(figure)
    text = "When each trial ran, from its beginning to its end; pauses between are part of it."
    return Chart("timeline", "Timeline", text, data)

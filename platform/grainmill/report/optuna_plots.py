"""Charts that Optuna draws, of the parameters and the timeline; and the list of all charts."""

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
from optuna.visualization import matplotlib as plots

from grainmill.config.experiment import Experiment
from grainmill.report import charts
from grainmill.report.charts import COLOURS, Chart, Subject
from grainmill.search.records import TrialRecord
from grainmill.search.study import Study

FEWEST = 3
"""Smallest number of complete trials for a chart of the parameters."""
PAIR = ("loss.weight", "model.p")
"""Parameters of the map, if both are searched."""


def charts_of(experiment: Experiment, study: Study, winner: TrialRecord) -> list[Chart]:
    """All charts of a search, in the order of the report."""
    stored = optuna.load_study(study_name=study.name, storage=study.url)
    trials = [trial for trial in stored.get_trials(deepcopy=False) if "setting" in trial.user_attrs]
    subject = Subject(experiment, study.records, winner)
    drawn = [charts.front(subject)] if len(experiment.objective) > 1 else []
    drawn.append(charts.curves(subject))
    if experiment.space:
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        drawn += [charts.space(subject), _importances(subject, complete)]
        drawn += [_coordinates(subject, complete), _contour(subject, complete)]
    return [*drawn, _timeline(subject, trials)]


def _study(subject: Subject, trials: Sequence[FrozenTrial], objectives: int, negated: bool = False) -> optuna.Study:
    """A study in memory of the first objectives; if `negated`, all of them are to be made small."""
    ways = list(subject.experiment.objective.values())[:objectives]
    study = optuna.create_study(
        directions=["minimize" if negated or way == "min" else "maximize" for way in ways],
        sampler=optuna.samplers.RandomSampler(),
    )
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        study.set_metric_names(list(subject.experiment.objective)[:objectives])
    for trial in trials:
        changed = copy(trial)
        if trial.state == TrialState.COMPLETE:
            values = trial.values[:objectives]
            changed.values = [-x if negated and way == "max" else x for x, way in zip(values, ways, strict=True)]
        study.add_trial(changed)
    return study


@contextmanager
def _drawing() -> Iterator[None]:
    """Let Optuna draw through pyplot without a window, and restore what it changes: backend, style, open figures."""
    from matplotlib import pyplot

    backend = matplotlib.rcParams.copy()["backend"]  # of a copy: the original would look for a window system
    figures = pyplot.get_fignums()
    # Optuna warns that its charts are experimental, Matplotlib of a parameter with a single value.
    with matplotlib.rc_context(), warnings.catch_warnings(action="ignore"):
        pyplot.switch_backend("agg")
        try:
            yield
        finally:
            for number in set(pyplot.get_fignums()) - set(figures):
                pyplot.close(number)
            if isinstance(backend, str):  # otherwise none was chosen
                pyplot.switch_backend(backend)


def _restyled(ax: Axes, height: float) -> Figure:
    """Optuna's figure in the style of the other charts, without titles: the report has them."""
    figure = ax.figure
    assert isinstance(figure, Figure), "not a part of one"
    # A colour bar that was made without a layout stays without one.
    figure.set(size_inches=(10, height), facecolor="white", layout_engine="none" if figure.axes[1:] else "constrained")
    for one in figure.axes:
        for place in ("left", "center"):
            one.set_title("", loc=place)
        one.set_facecolor("white")
        one.grid(False)
    return figure


def _too_few(complete: Sequence[FrozenTrial]) -> str | None:
    """The reason to leave out the charts of the parameters, if there is one."""
    if len(complete) < FEWEST:
        return f"left out: it takes {FEWEST} complete trials, got {len(complete)}"
    drawn = {name for trial in complete for name in trial.params}
    if len(drawn) < 2:
        return f"left out: it takes 2 searched parameters, got {len(drawn)} in complete trials"
    return None


def _importances(subject: Subject, complete: Sequence[FrozenTrial]) -> Chart:
    name, title, objectives = "importances", "Importance of the parameters", len(subject.experiment.objective)
    if reason := _too_few(complete):
        return Chart(name, title, reason, None)
    # With several objectives, Optuna rates the parameters by how they make each objective small.
    study = _study(subject, complete, objectives, negated=True)
    with _drawing(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ax = plots.plot_param_importances(study)
        if any("will be equal" in str(warning.message) for warning in caught):
            return Chart(name, title, "left out: the complete trials are equally good, or nearly all are", None)
        figure = _restyled(ax, 1.5 + 0.28 * objectives * len(ax.get_yticks()))
        ax.grid(axis="x", alpha=0.3)
        ax.set(xlabel="importance (a share of 1)", ylabel="")
        data = charts.png(figure)
    few = "" if len(complete) >= 50 else f" {len(complete)} complete trials give no more than a hint."
    text = "What sets the best tenth of the complete trials apart from the others (PED-ANOVA)." + few
    return Chart(name, title, text, data)


def _coordinates(subject: Subject, complete: Sequence[FrozenTrial]) -> Chart:
    name, title, objectives = "coordinates", "Parallel coordinates", len(subject.experiment.objective)
    if reason := _too_few(complete):
        return Chart(name, title, reason, None)
    study = _study(subject, complete, objectives)
    with _drawing():
        ax = plots.plot_parallel_coordinate(study, target_name=next(iter(subject.experiment.objective)))
        for lines in ax.collections:  # Optuna's colours fade to white
            lines.set(cmap="viridis" if lines.get_cmap().name.endswith("_r") else "viridis_r", linewidth=1.6, alpha=0.8)
        data = charts.png(_restyled(ax, 5))
    return Chart(name, title, "Each line is a complete trial; None stands where a parameter was not drawn.", data)


def _contour(subject: Subject, complete: Sequence[FrozenTrial]) -> Chart:
    """Map of the first objective over two parameters."""
    name, title, metric = "contour", "Map of two parameters", next(iter(subject.experiment.objective))
    if reason := _too_few(complete):
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
        ax = plots.plot_contour(study, [x, y], target_name=metric)
        for kind in ("published setting", "winner"):
            for record in subject.complete:
                if subject.kind(record) == kind and all(space[one].active(record.setting) for one in pair):
                    at = (record.setting[ax.get_xlabel()], record.setting[ax.get_ylabel()])
                    ax.plot(*at, "*", ms=17, mec="white", color=COLOURS[kind], label=kind, zorder=10)
        ax.legend(loc="upper left", bbox_to_anchor=(0, 1.12), ncols=2, frameon=False)
        data = charts.png(_restyled(ax, 5.5))
    return Chart(name, f"{title}: {x} and {y}", f"{metric}, interpolated between the complete trials (dots).", data)


def _pair(study: optuna.Study, complete: Sequence[FrozenTrial]) -> tuple[str, ...]:
    """The two parameters of the map: `PAIR`, or else the most important numeric ones."""
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
    with warnings.catch_warnings(action="ignore"):  # with few trials, any two parameters will do
        important = optuna.importance.get_param_importances(study)
    return tuple([name for name in important if name in numeric][:2])


def _timeline(subject: Subject, trials: Sequence[FrozenTrial]) -> Chart:
    with _drawing():
        ax = plots.plot_timeline(_study(subject, trials, len(subject.experiment.objective)))
        for bar, record in zip(ax.patches, subject.records, strict=True):
            bar.set(facecolor=COLOURS[subject.kind(record)], y=record.number - bar.get_height() / 2)
        ax.get_legend().remove()
        ax.invert_yaxis()
        figure = _restyled(ax, min(8, 1.6 + 0.2 * len(trials)))
        ax.grid(axis="x", alpha=0.3)
        locator = AutoDateLocator()
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        ax.tick_params(axis="x", rotation=0)
        ax.set(xlabel="time", ylabel="trial")
        charts.legend(figure, charts.kinds(subject, ""))
        data = charts.png(figure)
    text = "The time from the beginning to the end of each trial, pauses included."
    return Chart("timeline", "Timeline", text, data)

"""Charts of a search as PNG: Pareto front, learning curves, space."""

import io
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from grainmill.config.experiment import Experiment
from grainmill.config.space import Parameter, shown
from grainmill.config.validation import COSTS
from grainmill.search import selection
from grainmill.search.asha import ASHA
from grainmill.search.records import TrialRecord

GREY = "#9aa5b1"
COLOURS = {
    "winner": "#1e8449",
    "published setting": "#e08e0b",
    "complete": "#1b6ca8",
    "stopped": GREY,
    "failed": "#c0392b",
    "paused": GREY,
    "running": GREY,
}
"""Colours of trials by kind; kinds that come first are drawn on top."""
ENDS = {"complete": "o", "stopped": "x", "failed": "X"}
"""Markers by the way a trial ended."""
DPI = 110


class Chart(NamedTuple):
    """A chart of the report, or the reason why it is missing."""

    name: str
    """Name of its file, without the suffix."""
    title: str
    text: str
    """Caption, or the reason why the chart was left out."""
    png: bytes | None


class Subject(NamedTuple):
    """The search that the charts show."""

    experiment: Experiment
    records: Sequence[TrialRecord]
    winner: TrialRecord

    def kind(self, record: TrialRecord) -> str:
        """Kind of a trial, a key of `COLOURS`."""
        if record == self.winner:
            return "winner"
        return "published setting" if record.setting == self.experiment.reference else record.state

    @property
    def complete(self) -> list[TrialRecord]:
        """The trials that ran to their end."""
        return [record for record in self.records if record.state == "complete"]


def _label(experiment: Experiment, metric: str) -> str:
    """Label of an objective's axis; only costs have a unit."""
    unit = " / s" if metric in COSTS else ""
    return f"{metric}{unit} ({'larger' if experiment.objective[metric] == 'max' else 'smaller'} is better)"


def _canvas(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes in rows of `columns`, each `height` inches high."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(10, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes[count:]:
        ax.set_axis_off()
    for ax in axes[:count]:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    laid_out = isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine)
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches=None if laid_out else "tight")
    return buffer.getvalue()


def legend(figure: Figure, entries: Mapping[str, tuple[str, str, str]]) -> None:
    """Draw a legend below the axes; the entries map a label to a marker, a line style and a colour."""
    handles = [
        Line2D([], [], marker=marker, linestyle=line, color=colour, label=label)
        for label, (marker, line, colour) in entries.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def kinds(subject: Subject, line: str) -> dict[str, tuple[str, str, str]]:
    """Entries of the legend for the kinds of trials in the search."""
    present = {subject.kind(record) for record in subject.records}
    return {
        "stopped early" if kind == "stopped" else kind: (ENDS.get(kind, "o"), line, colour)
        for kind, colour in COLOURS.items()
        if kind in present
    }


def front(subject: Subject) -> Chart:
    """Complete trials and their variants, in pairs of the first three objectives."""
    experiment = subject.experiment
    entries, best = selection.entries(subject.records), selection.front(experiment, subject.records)
    pairs = list(combinations(list(experiment.objective)[:3], 2))
    figure, axes = _canvas(len(pairs), 3, 5 if len(pairs) == 1 else 4)
    for ax, (x, y) in zip(axes, pairs, strict=True):
        for entry in entries:
            _draw_entry(ax, subject, entry, entry in best, (entry.metrics[x], entry.metrics[y]))
        if len(experiment.objective) == 2:
            line = sorted((entry.metrics[x], entry.metrics[y]) for entry in best)
            # The points that a point of the front dominates lie on its worse side.
            steps = "steps-pre" if experiment.objective[x] == "max" else "steps-post"
            ax.plot(*zip(*line, strict=True), color="black", lw=0.8, alpha=0.5, drawstyle=steps, zorder=1)
        ax.set(xlabel=_label(experiment, x), ylabel=_label(experiment, y))
    present = {subject.kind(record) for record in subject.complete}
    marks = {kind: ("*" if kind == "winner" else "o", "", COLOURS[kind]) for kind in list(COLOURS)[:3]}
    marks = {kind: mark for kind, mark in marks.items() if kind in present}
    variants = {"variant of a trial": ("D", "", GREY)} if any(entry.variant for entry in entries) else {}
    legend(figure, marks | variants | {"on the front": (".", "-", "black")})
    text = (
        "Every complete trial, and the variants at which its trained network was evaluated, too, at the cost of its "
        "trial. Numbers are the trials'; a black edge marks the front, in which constraints play no part."
    )
    if len(experiment.objective) > 3:
        text += " Of the objectives, the first three are shown; the front is that of all."
    return Chart("front", "Pareto front", text, png(figure))


def _draw_entry(ax: Axes, subject: Subject, entry: selection.Entry, best: bool, at: tuple[float, float]) -> None:
    kind = subject.kind(entry.record)
    marker, size = ("D", 5) if entry.variant else ("*", 15) if kind == "winner" else ("o", 8)
    style: dict[str, Any] = {
        "mec": "black" if best else COLOURS[kind],
        "mfc": "none" if entry.variant else COLOURS[kind],
        "mew": 1.4,
    }
    ax.plot(*at, marker, ms=size, **style, zorder=_layer(kind), alpha=1 if best else 0.65)
    if entry.variant or best:
        number = str(entry.record.number)
        ax.annotate(number, at, (5, 4), textcoords="offset points", size=7.5, color="#52606d", zorder=20)


def curves(subject: Subject) -> Chart:
    """Each objective by epoch."""
    experiment = subject.experiment
    rungs = ASHA(experiment).levels
    count = len(experiment.objective)
    figure, axes = _canvas(count, 2, 4.2 if count == 1 else 3.8)
    for ax, metric in zip(axes, experiment.objective, strict=True):
        for rung in rungs:
            ax.axvline(rung, color="#52606d", lw=0.7, ls=":", zorder=0)
        for record in subject.records:
            kind = subject.kind(record)
            style: dict[str, Any] = {"color": COLOURS[kind], "zorder": _layer(kind)}
            epochs, values = [row["epoch"] for row in record.history], [row[metric] for row in record.history]
            ax.plot(epochs, values, lw=2.2 if kind in ("winner", "published setting") else 1.1, **style)
            ax.plot(epochs[-1:], values[-1:], ENDS.get(record.state, "."), ms=6, **style)
        ax.set(xlabel="epoch", ylabel=_label(experiment, metric))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, kinds(subject, "-") | ({"rung": ("", ":", "#52606d")} if rungs else {}))
    levels = f"epoch{'s' * (len(rungs) > 1)} {', '.join(map(str, rungs))}"
    judged = f" Trials are judged after {levels}." if rungs else ""
    return Chart("curves", "Learning curves", f"Each line ends where its trial did.{judged}", png(figure))


def space(subject: Subject) -> Chart:
    """The first objective against each searched parameter, at the last epoch of each trial."""
    experiment = subject.experiment
    metric = next(iter(experiment.objective))
    figure, axes = _canvas(len(experiment.space), 3, 2.7)
    for index, (ax, (name, parameter)) in enumerate(zip(axes, experiment.space.items(), strict=True)):
        searched = [record for record in subject.records if record.history and parameter.active(record.setting)]
        words = list(dict.fromkeys([*(parameter.choice or ()), *(record.setting[name] for record in searched)]))
        for record in searched:
            value, kind = record.setting[name], subject.kind(record)
            x, marker = words.index(value) if parameter.choice else value, ENDS.get(record.state, "o")
            ax.plot(x, record.metrics[metric], marker, color=COLOURS[kind], zorder=_layer(kind))
        ax.set(xlabel=name, ylabel=metric if index % 3 == 0 else "")
        _scale(ax, parameter, [shown(word) for word in words])
    legend(figure, kinds(subject, ""))
    text = f"{metric} after the last epoch of each trial, against each parameter where it was searched."
    return Chart("space", "The space", text, png(figure))


def _layer(kind: str) -> int:
    """Drawing order of a kind; larger is on top."""
    return len(COLOURS) - list(COLOURS).index(kind)


def _scale(ax: Axes, parameter: Parameter, words: Sequence[str]) -> None:
    if parameter.choice:
        ax.set(xticks=range(len(words)), xticklabels=words, xlim=(-0.5, len(words) - 0.5))
    elif parameter.loguniform:
        low, high = parameter.loguniform
        ticks = [low, math.sqrt(low * high), high]
        ax.set(xscale="log", xticks=ticks, xticklabels=[f"{tick:.2g}" for tick in ticks])
        ax.minorticks_off()

"""One self-contained HTML page about a run: what won, every trial, learning curves, the space."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grainmill.experiment import Experiment
from grainmill.registry import Version
from grainmill.search import Record
from grainmill.space import shown

COLOURS = {"complete": "#1b6ca8", "stopped": "#9aa5b1", "failed": "#c0392b", "running": "#9aa5b1"}
REFERENCE_COLOUR, WINNER_COLOUR = "#e08e0b", "#1e8449"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1f2933; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e7eb; }}
th:first-child, td:first-child {{ text-align: left; }} thead th {{ border-bottom: 2px solid #9aa5b1; }}
tr.winner td {{ background: #e6f4ea; }} tr.reference td {{ background: #fdf1de; }}
.key {{ color: #52606d; }} img {{ max-width: 100%; }} .scroll {{ overflow-x: auto; }}
</style></head><body>
<h1>{title}</h1><p class="key">{summary}</p>{body}</body></html>
"""


def html(
    experiment: Experiment, records: Sequence[Record], winner: Record | None, final: Record, version: Version
) -> str:
    """The page.

    Args:
        experiment: what was run.
        records: the trials, the first with the published setting.
        winner: the best of them; None where nothing was searched.
        final: the training whose model was registered.
        version: the registered model.
    """
    sections = [_comparison(experiment, records, winner, final)]
    if winner:
        sections += ["<h2>Learning curves</h2>", _picture(_curves(experiment, records, winner))]
    if winner and experiment.space:
        sections += ["<h2>The space</h2>", _picture(_space(experiment, records, winner))]
    if winner:
        sections += ["<h2>Trials</h2>", _trials(experiment, records, winner)]
    summary = f"{counted(records)}; the model is {escape(version.uri)}, objective {', '.join(experiment.objective)}"
    return _PAGE.format(title=escape(f"Grainmill: {experiment.name}"), summary=summary, body="\n".join(sections))


def counted(records: Sequence[Record]) -> str:
    """How many trials ended how, in words."""
    counts = {state: sum(record.state == state for record in records) for state in ("complete", "stopped", "failed")}
    plural = "trial" if len(records) == 1 else "trials"
    return f"{len(records)} {plural}: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def metric_names(experiment: Experiment, record: Record) -> list[str]:
    """The objectives, then the other metrics that every trial is judged by: those in [0, 1] named for a score."""
    others = [name for name in record.metrics if name.startswith("top") or name.endswith("_map")]
    return list(dict.fromkeys([*experiment.objective, *others]))


def _table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[object]]]) -> str:
    """HTML of rows of (CSS class, cells)."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = [
        f'<tr class="{kind}">' + "".join(f"<td>{escape(shown(cell))}</td>" for cell in cells) + "</tr>"
        for kind, cells in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _comparison(experiment: Experiment, records: Sequence[Record], winner: Record | None, final: Record) -> str:
    """The published setting, the winner and its second training, side by side."""
    columns = {"trained again" if winner else "trained": final}
    if winner:
        columns = {"published setting": records[0], "winner": winner, **columns}
    header = ["", *columns]
    settings = [
        ("", [name, *(record.setting[name] for record in columns.values())]) for name in experiment.space if winner
    ]
    metrics = [
        ("", [name, *(record.metrics.get(name, math.nan) for record in columns.values())])
        for name in [*metric_names(experiment, final), "epoch"]
    ]
    return _table(header, [*settings, *metrics])


def _trials(experiment: Experiment, records: Sequence[Record], winner: Record) -> str:
    names = metric_names(experiment, winner)
    rows = []
    for record in records:
        kind = "winner" if record == winner else "reference" if record.number == 0 else ""
        metrics = [record.metrics.get(name, math.nan) for name in names]
        epoch = int(record.metrics.get("epoch", 0))
        rows.append((kind, [record.number, record.cause or record.state, epoch, *metrics, *record.setting.values()]))
    return _table(["trial", "state", "epochs", *names, *records[0].setting], rows)


def _picture(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _colour(record: Record, winner: Record) -> str:
    if record == winner:
        return WINNER_COLOUR
    return REFERENCE_COLOUR if record.number == 0 else COLOURS[record.state]


def _legend(axes: Axes) -> None:
    for label, colour in (
        ("winner", WINNER_COLOUR),
        ("published setting", REFERENCE_COLOUR),
        ("complete", COLOURS["complete"]),
        ("stopped early", COLOURS["stopped"]),
    ):
        axes.plot([], [], "o-", color=colour, label=label)
    axes.legend(loc="best", frameon=False)


def _curves(experiment: Experiment, records: Sequence[Record], winner: Record) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, len(experiment.objective), squeeze=False)[0]
    for ax, metric in zip(axes, experiment.objective, strict=True):
        for record in records:
            epochs = [row["epoch"] for row in record.history]
            ax.plot(epochs, [row[metric] for row in record.history], "o-", ms=3, color=_colour(record, winner))
        ax.set(xlabel="epoch", ylabel=metric)
        ax.grid(alpha=0.3)
    _legend(axes[0])
    return figure


def _space(experiment: Experiment, records: Sequence[Record], winner: Record) -> Figure:
    """The first objective against each searched parameter, at the last epoch of each trial."""
    metric = next(iter(experiment.objective))
    columns = min(3, len(experiment.space))
    rows = math.ceil(len(experiment.space) / columns)
    figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for ax, (name, parameter) in zip(axes, experiment.space.items(), strict=False):
        words = list(dict.fromkeys([*(parameter.choice or ()), *(r.setting[name] for r in records)]))
        for record in records:
            if record.history:
                value = record.setting[name]
                x = words.index(value) if parameter.choice else value
                marker = "o" if record.state == "complete" else "x"
                ax.plot(x, record.metrics[metric], marker, color=_colour(record, winner))
        ax.set(xlabel=name)
        if parameter.choice:
            ax.set(xticks=range(len(words)), xticklabels=map(shown, words), xlim=(-0.5, len(words) - 0.5))
        elif parameter.loguniform:
            low, high = parameter.loguniform
            ticks = [low, math.sqrt(low * high), high]
            ax.set(xscale="log", xticks=ticks, xticklabels=[f"{tick:.2g}" for tick in ticks])
            ax.minorticks_off()
        ax.grid(alpha=0.3)
    for ax in axes[len(experiment.space) :]:
        ax.set_axis_off()
    for ax in axes[::columns]:
        ax.set_ylabel(metric)
    return figure

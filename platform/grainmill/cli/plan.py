"""The command `grainmill plan`."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.table import Column, Table

from grainmill.cli.console import USAGE_ERROR, File, Overrides, clear_errors, err, out
from grainmill.cluster import shape
from grainmill.cluster.shape import Cluster
from grainmill.config import experiment
from grainmill.config.experiment import Experiment
from grainmill.config.validation import HOURS
from grainmill.errors import GrainmillError

if TYPE_CHECKING:
    from grainmill.workflows.forecast import Course, Pace

PLAYS = 20
"""Over which means and ranges are taken."""
BOOT_MINUTES = 5.0
"""From asking for a node until it works: a machine, its image, Ray; not measured on any cloud."""
START_SECONDS = 10.0
"""Until the processes of a trial train on a node that works: Python, torch and the data; as the tests' take."""

Found = TypeVar("Found")


def plan(
    file: File,
    on: Annotated[
        Path, typer.Option("--cluster", help="Of Ray's launcher, such as infra/aws/cluster.yaml, or a RayCluster.")
    ],
    seconds: Annotated[float | None, typer.Option("--epoch-seconds", min=0.001, help="That an epoch takes.")] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="An earlier run whose epochs took as long.")
    ] = None,
    boot: Annotated[float, typer.Option("--boot-minutes", min=0, help="Until a node works.")] = BOOT_MINUTES,
    overrides: Overrides = None,
) -> None:
    """Tell what tune will take of a cluster: trials at once, hours, node-hours, the price; start nothing.

    The images are not looked at, nor is anything asked of a cloud. One of --epoch-seconds and --like is required.
    """
    with clear_errors():
        problems: list[GrainmillError] = []

        def tried(call: Callable[[], Found]) -> Found | None:
            try:
                return call()
            except GrainmillError as error:
                problems.append(error)
                return None

        checked = tried(lambda: experiment.load(file, overrides or (), here=False))
        found = tried(lambda: shape.read_cluster(on))
        epoch = tried(lambda: _epoch(seconds, like))
        if checked and found:
            for workers in dict.fromkeys((checked.resources.workers, checked.resources.retrain_workers)):
                tried(partial(found.trials_that_fit, checked.resources.need(workers)))
        if problems:
            for error in problems:
                err.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(USAGE_ERROR)
        assert checked
        assert found
        assert epoch
        from grainmill.workflows import forecast

        pace = forecast.Pace(epoch, 60 * boot, START_SECONDS)
        courses = [forecast.play(checked, found, pace, seed) for seed in range(PLAYS)]
        _show(checked, found, courses, pace)


def _epoch(seconds: float | None, like: Path | None) -> float:
    if (seconds is None) == (like is None):
        raise typer.BadParameter("hours need the time of an epoch: one of --epoch-seconds N and --like RUN_FOLDER")
    if seconds is not None:
        return seconds
    assert like, "one of them is given"
    from grainmill.workflows import earlier

    return earlier.epoch_seconds(like)


def _show(checked: Experiment, on: Cluster, courses: Sequence["Course"], pace: "Pace") -> None:
    resources, trials = checked.resources, checked.search.trials
    need, again = resources.need(resources.workers), resources.need(resources.retrain_workers)
    fits = on.trials_that_fit(need)
    at_once = min(fits, resources.concurrent or fits, trials)
    needs = " and ".join(f"{amount:g} {name}" for name, amount in resources.bundle.items())
    count = f"{need.most}" if need.fewest == need.most else f"{need.fewest} to {need.most}"
    workers = f"{count} x {needs}" if need.most > 1 else needs
    _say(f"{trials} trials, {at_once} at once ({workers} each), in {math.ceil(trials / at_once)} waves")
    table = Table("", *(Column(head, justify="right") for head in ("search", "the best again", "in all")))
    for name, parts in _rows(checked, courses):
        table.add_row(name, *(_cell(values) for values in (*parts, [sum(pair) for pair in zip(*parts, strict=True)])))
    out.print(table)
    _show_nodes(on, courses)
    shared = f"; on {again.most} workers proportionally" if again.most != need.most else ""
    _say(
        f"taken for granted: {pace.epoch:g} seconds an epoch{shared}; {pace.boot / 60:g} minutes until a node works, "
        f"{pace.start:g} seconds until its processes do; {on.idle_seconds / 60:g} minutes without work until it goes; "
        "no node is lost, none is there at the start"
    )


def _rows(checked: Experiment, courses: Sequence["Course"]) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """What the table tells, of the search and of the training of the best again, play by play."""
    yield "hours", ([one.search / 3600 for one in courses], [one.again / 3600 for one in courses])
    yield "epochs", ([one.epochs[0] for one in courses], [one.epochs[1] for one in courses])
    for name, unit in (("GPU", HOURS["gpu_seconds"]), ("CPU", HOURS["cpu_seconds"])):
        if amount := checked.resources.bundle.get(name, 0) / 3600:
            yield unit, ([one.busy[0] * amount for one in courses], [one.busy[1] * amount for one in courses])


def _show_nodes(on: Cluster, courses: Sequence["Course"]) -> None:
    """Node-hours by type, what of them is idle, and the price."""
    table = Table("node-hours", Column("", justify="right"), Column("dollars", justify="right"))
    known = {one.name: one.price for one in (on.head, *on.worker_types)}
    for name in courses[0].nodes:
        hours = [one.nodes[name] / 3600 for one in courses]
        price = known[name]
        table.add_row(name, _cell(hours), "?" if price is None else _cell([price * one for one in hours]))
    table.add_section()
    for name, seconds in (
        ("of these, booting", [one.booting for one in courses]),
        ("waiting for other trials", [one.waiting for one in courses]),
        ("without work, until they go", [one.leaving for one in courses]),
    ):
        table.add_row(name, _cell([one / 3600 for one in seconds]), "")
    out.print(table)
    unpriced = [name for name in courses[0].nodes if known[name] is None]
    if unpriced:
        _say(f"no price for {', '.join(unpriced)}: the cluster file has none in provider.prices, so hours only")
        return
    totals = [sum(seconds / 3600 * (known[name] or 0) for name, seconds in one.nodes.items()) for one in courses]
    _say(f"price: {_cell(totals)} dollars, by the table in the cluster file")


def _cell(values: Sequence[float]) -> str:
    """Mean, and range if there is one."""
    low, high = _number(min(values)), _number(max(values))
    return _number(statistics.fmean(values)) + (f" ({low}-{high})" if low != high else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)

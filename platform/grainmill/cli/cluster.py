"""Commands about a Ray cluster: `grainmill plan` forecasts a search on it, `grainmill submit` sends a job to it."""

import math
import os
import shlex
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.table import Column

from grainmill import environment, trainable
from grainmill.cli.console import (
    FAILURE,
    INTERRUPTED,
    USAGE_ERROR,
    File,
    Overrides,
    clear_errors,
    complain,
    print_table,
    say,
)
from grainmill.cluster import shape
from grainmill.cluster.shape import Cluster
from grainmill.config import experiment
from grainmill.config.experiment import Experiment
from grainmill.config.validation import HOURS
from grainmill.errors import GrainmillError

if TYPE_CHECKING:
    from grainmill.cluster.job_files import JobFiles
    from grainmill.workflows.forecast import Pace, SimulatedRun

JOBS = "~/.cache/grainmill/jobs"
"""Folder with the content that was sent last under each submission id; the printed command line names it."""
PLAYS = 20
"""Simulated runs from which `plan` takes means and ranges."""
BOOT_MINUTES = 5.0
"""Minutes from the request for a node until it works (machine, image, Ray); not measured on any cloud."""
START_SECONDS = 10.0
"""Duration in seconds of the start of a trial's processes (Python, torch, data), as measured in the tests."""

Result = TypeVar("Result")
Values = list[float]


def submit(
    verb: Annotated[Literal["tune", "train"], typer.Argument(help="What the job does.", metavar="tune|train")],
    file: File,
    address: Annotated[
        str,
        typer.Option(
            help="Dashboard of the cluster's head, such as http://127.0.0.1:8265.", envvar="RAY_API_SERVER_ADDRESS"
        ),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files that would be sent, and end.")] = False,
    overrides: Overrides = None,
) -> None:
    """Run tune or train as a job of a Ray cluster, and follow it.

    The code and the file are sent, the data are not: the images and the storage folder are the cluster's, and are
    checked there. Keys and credentials stay. Ctrl-C leaves the job running. A job that failed, was stopped or was lost
    carries on when it is submitted again.

    Example: grainmill submit tune my.yaml --address http://127.0.0.1:8265 --set storage=/shared/grainmill-runs
    """
    with clear_errors():
        environment.prepare()
        from grainmill.cluster import job_files, submission

        checked = experiment.load(file, overrides or (), here=False)
        job = job_files.list_job(file, trainable.find(checked.trainable))
        if dry_run:
            for target, path in job.sent.items():
                say(f"{path.stat().st_size:>12,}  {target}")
            _say_what_stays(job)
            return
        if not address:
            raise typer.BadParameter("a job needs a cluster: --address http://HEAD:8265, or --dry-run for its files")
        submission.check_storage(checked)
        address = address.rstrip("/")
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers it to every --address
        client = submission.connect(address)
        name = submission.next_submission_id(client, address, checked.name)
        jobs = Path(JOBS).expanduser()
        submission.delete_old_packages(jobs, checked.name)
        job_files.write_job(job, checked.trainable, jobs / name)
        _say_what_stays(job)
        line = submission.submit_command(address, name, jobs / name, verb, file, overrides or ())
        say(shlex.join(line))
        _follow(line, name, lambda: submission.job_status(client, name), submission.job_commands(address, name))


def _say_what_stays(job: "JobFiles") -> None:
    """Print the size of a job, and what is left out: by name and number what is no code, all else with the reason."""
    from grainmill.cluster.job_files import NO_CODE, megabytes

    names = Counter(Path(path).name for path, reason in job.left_out.items() if reason == NO_CODE)
    left_out = ", ".join(f"{name} ({count})" for name, count in names.items()) or "nothing"
    say(f"{len(job.sent)} files, {megabytes(job.bytes)}; left out: {left_out}")
    for path, reason in job.left_out.items():
        if reason != NO_CODE:
            complain(f"{path} {reason}, and is left out", "yellow")


def _follow(line: list[str], name: str, state_of: Callable[[], Any], advice: str) -> None:
    """Submit a job and follow it; ends with the job's code, and says how to go on where the job has not ended."""
    try:
        subprocess.run(line, check=False)  # its own code is 0 for a job that was stopped, too
        state = state_of()
    except KeyboardInterrupt:
        complain(f"{name} is left as it is", "yellow")
        say(advice)
        raise typer.Exit(INTERRUPTED) from None
    if state == "SUCCEEDED":
        return
    if not state.is_terminal():
        complain(f"{name} is {state.lower()}, but could not be followed", "yellow")
        say(advice)
    raise typer.Exit(FAILURE)


def plan(
    file: File,
    on: Annotated[
        Path, typer.Option("--cluster", help="File of Ray's launcher, such as infra/aws/cluster.yaml, or a RayCluster.")
    ],
    seconds: Annotated[float | None, typer.Option("--epoch-seconds", min=0.001, help="Seconds of an epoch.")] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="An earlier run whose epochs took as long.")
    ] = None,
    boot: Annotated[
        float, typer.Option("--boot-minutes", min=0, help="Minutes until a new node works.")
    ] = BOOT_MINUTES,
    overrides: Overrides = None,
) -> None:
    """Forecast what tune will take of a cluster: trials at once, hours, node-hours, the price; start nothing.

    The images are not looked at, and no cloud is asked. One of --epoch-seconds and --like is required.

    Example: grainmill plan my.yaml --cluster infra/aws/cluster.yaml --epoch-seconds 120
    """
    with clear_errors():
        problems: list[GrainmillError] = []

        def attempt(call: Callable[[], Result]) -> Result | None:
            try:
                return call()
            except GrainmillError as error:
                problems.append(error)
                return None

        checked = attempt(lambda: experiment.load(file, overrides or (), here=False))
        cluster = attempt(lambda: shape.read_cluster(on))
        epoch = attempt(lambda: _epoch_seconds(seconds, like))
        if checked and cluster:
            for workers in dict.fromkeys((checked.resources.workers, checked.resources.retrain_workers)):
                attempt(partial(cluster.trials_that_fit, checked.resources.need(workers)))
        if problems:
            for error in problems:
                complain(str(error))
            raise typer.Exit(USAGE_ERROR)
        assert checked
        assert cluster
        assert epoch
        from grainmill.workflows import forecast

        pace = forecast.Pace(epoch, 60 * boot, START_SECONDS)
        runs = [forecast.simulate(checked, cluster, pace, seed) for seed in range(PLAYS)]
        _show_forecast(checked, cluster, runs, pace)


def _epoch_seconds(seconds: float | None, like: Path | None) -> float:
    if (seconds is None) == (like is None):
        raise typer.BadParameter("hours need the time of an epoch: one of --epoch-seconds N and --like RUN_FOLDER")
    if seconds is not None:
        return seconds
    assert like, "one of the two is given"
    from grainmill.workflows import forecast

    return forecast.epoch_seconds(like)


def _show_forecast(checked: Experiment, cluster: Cluster, runs: Sequence["SimulatedRun"], pace: "Pace") -> None:
    resources, trials = checked.resources, checked.search.trials
    need, again = resources.need(resources.workers), resources.need(resources.retrain_workers)
    fits = cluster.trials_that_fit(need)
    at_once = min(fits, resources.concurrent or fits, trials)
    needs = " and ".join(f"{amount:g} {name}" for name, amount in resources.bundle.items())
    count = f"{need.most}" if need.fewest == need.most else f"{need.fewest} to {need.most}"
    workers = f"{count} x {needs}" if need.most > 1 else needs
    waves = math.ceil(trials / at_once)
    say(f"{trials} trials, {at_once} at once ({workers} each), in {waves} {'wave' if waves == 1 else 'waves'}")
    rows = [
        (name, *(_cell(values) for values in (*parts, [sum(pair) for pair in zip(*parts, strict=True)])))
        for name, parts in _parts(checked, runs)
    ]
    print_table(("", *(Column(head, justify="right") for head in ("search", "the best again", "in all"))), rows)
    _show_nodes(cluster, runs)
    shared = f"; on {again.most} workers proportionally" if again.most != need.most else ""
    say(
        f"taken for granted: {pace.epoch:g} seconds an epoch{shared}; {pace.boot / 60:g} minutes until a node works, "
        f"{pace.start:g} seconds until its processes do; {cluster.idle_seconds / 60:g} minutes without work until it "
        "goes; no node is lost, none is there at the start"
    )


def _parts(checked: Experiment, runs: Sequence["SimulatedRun"]) -> Iterator[tuple[str, tuple[Values, Values]]]:
    """Rows of the table: a name, and the values of all runs for the search and for the training of the best again."""
    yield "hours", ([one.search / 3600 for one in runs], [one.retraining / 3600 for one in runs])
    yield "epochs", ([one.epochs[0] for one in runs], [one.epochs[1] for one in runs])
    for name, unit in (("GPU", HOURS["gpu_seconds"]), ("CPU", HOURS["cpu_seconds"])):
        if amount := checked.resources.bundle.get(name, 0) / 3600:
            yield unit, ([one.busy[0] * amount for one in runs], [one.busy[1] * amount for one in runs])


def _show_nodes(cluster: Cluster, runs: Sequence["SimulatedRun"]) -> None:
    """Print node-hours by type, the idle ones among them, and the price."""
    prices = {one.name: one.price for one in (cluster.head, *cluster.worker_types)}
    rows = []
    for name in runs[0].nodes:
        hours, price = [one.nodes[name] / 3600 for one in runs], prices[name]
        rows.append((name, _cell(hours), "?" if price is None else _cell([price * one for one in hours])))
    idle = {
        "of these, booting": [one.booting for one in runs],
        "waiting for other trials": [one.waiting for one in runs],
        "without work, until they go": [one.leaving for one in runs],
    }
    section = len(rows) - 1
    rows += [(name, _cell([one / 3600 for one in seconds]), "") for name, seconds in idle.items()]
    print_table(("node-hours", Column("", justify="right"), Column("dollars", justify="right")), rows, section=section)
    unpriced = [name for name in runs[0].nodes if prices[name] is None]
    if unpriced:
        say(f"no price for {', '.join(unpriced)}: the cluster file has none in provider.prices, so hours only")
        return
    totals = [sum(seconds / 3600 * (prices[name] or 0) for name, seconds in one.nodes.items()) for one in runs]
    say(f"price: {_cell(totals)} dollars, by the table in the cluster file")


def _cell(values: Sequence[float]) -> str:
    """Mean, and the range if there is one."""
    low, high = _number(min(values)), _number(max(values))
    return _number(statistics.fmean(values)) + (f" ({low}-{high})" if low != high else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

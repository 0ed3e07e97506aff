"""The command `grainmill`; it, `champion`, `plan`, `submit`, `use`, `console` print, exit or read the environment."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Column, Table

from grainmill import trainable as catalog
from grainmill.cli import corpus, plan, registry, submit
from grainmill.cli.console import File, Overrides, clear_errors, out, prepare_process, show_progress, tracking_uri
from grainmill.config import experiment
from grainmill.config.experiment import Experiment
from grainmill.config.space import shown
from grainmill.errors import GrainmillError, hidden
from grainmill.workflows import run_folder

if TYPE_CHECKING:
    from grainmill.search.records import TrialRecord
    from grainmill.workflows.tune import Outcome

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, tune and ship MultiGrain image embeddings on Ray.",
)
app.command()(registry.promote)
app.command()(registry.rollback)
app.command()(corpus.embed)
app.command()(corpus.find)
app.command()(corpus.duplicates)
app.command()(submit.submit)
app.command()(plan.plan)

Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to use, such as auto; a local Ray is started by default.", envvar="RAY_ADDRESS"),
]


@app.command()
def validate(file: File, overrides: Overrides = None) -> None:
    """Check an experiment file and the images it names; start and write nothing."""
    with clear_errors():
        checked = _load(file, overrides)
        out.print(f"[green]{file} is right.[/] {checked.search.trials} trials of up to {checked.base.epochs} epochs")
        out.print(f"first trial: {_settings(checked.reference) or 'the base settings'}", highlight=False)


@app.command()
def tune(
    file: Annotated[Path | None, typer.Argument(help="Experiment file, YAML.", metavar="FILE")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Carry on the run of this name, without its file.")
    ] = None,
    overrides: Overrides = None,
    address: Address = None,
) -> None:
    """Search, train the best again, register the winner in MLflow: the first as champion, later ones as challenger.

    Started again, it carries on where it was cut short; a finished run is followed by another.
    """
    with clear_errors(), ExitStack() as stack:
        if (file is None) == (resume is None):
            raise typer.BadParameter("one of FILE and --resume NAME is required")
        if resume is not None:
            places = [value for key, _, value in (one.partition("=") for one in overrides or ()) if key == "storage"]
            storage = places[-1] if places else Experiment.model_fields["storage"].default
            file = stack.enter_context(run_folder.recorded(resume, storage))
        assert file, "one of them is given"
        _mill(file, overrides, address, "tune")


@app.command()
def train(file: File, overrides: Overrides = None, address: Address = None) -> None:
    """Train the base settings once, without a search, and register the model, as tune does."""
    _mill(file, overrides, address, "train")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="models:/name@alias, a run's folder, or one with checkpoints.")],
    on: Annotated[list[str], typer.Option("--on", metavar="BENCHMARK=PATH", help="What to evaluate on. Repeatable.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Such as sizes=[224,500] or exponents=[3,4,5]. Repeatable."),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for figures, pictures and pages.")] = Path("evaluation"),
    trainable: Annotated[str, typer.Option(help="What made the model in a folder.")] = "multigrain",
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            help="With more than one, a Ray Train group evaluates: one CPU each, and a GPU if there are as many. "
            "All nodes must see the benchmarks, the model's folder and --out.",
        ),
    ] = 1,
    address: Address = None,
) -> None:
    """Evaluate a trained model on benchmarks; a registered model's MLflow run gets the figures.

    A model that comes of it becomes a further version of the registered one; the alias champion stays where it is.
    """
    with clear_errors():
        prepare_process()
        from grainmill.workflows import evaluate as evaluation

        uri = tracking_uri()
        settings = [*(f"on.{one}" for one in on), *(overrides or ())]
        done = evaluation.evaluate(model, settings, trainable, folder, uri, workers, address)
        _show(done.assessment)
        if done.version:
            load = f'mlflow.set_tracking_uri("{hidden(uri)}"); mlflow.pyfunc.load_model("{done.version.uri}")'
            told = {"model": f"{done.version.uri}, serves {done.assessment.served}", "load": load}
        else:
            told = {"model": str(done.assessment.model.absolute())} if done.assessment.model else {}
        for key, value in told.items():
            out.print(f"{key:9} {value}", markup=False, highlight=False, soft_wrap=True)


def _show(assessment: catalog.EvaluationResult) -> None:
    """The headlines, the grids, published figures by benchmark, notes and files."""
    table = Table(Column("", overflow="fold"), "value", "95 % interval", "paper")
    for one in assessment.headlines:
        paper = "" if one.paper is None else f"{one.paper:.4f}"
        table.add_row(one.name, f"{one.value:.4f}", f"{one.low:.4f} to {one.high:.4f}", paper)
    out.print(table)
    for grid in assessment.grids:
        table = Table(f"{grid.down} \\ {grid.across}", *grid.columns, title=grid.title)
        for name, values in grid.rows.items():
            table.add_row(name, *(f"{value:.4f}" for value in values))
        out.print(table)
    tables: dict[str, Table] = {}
    for row in assessment.published:
        distractors = f"with {row.distractors:,} distractors" if row.distractors else ""
        title = " ".join(part for part in ("published:", row.benchmark, row.setting, distractors) if part)
        if title not in tables:
            tables[title] = Table("method", "lambda", "p", "size", "measure", "value", "source", title=title)
        weight = "" if row.weight is None else f"{row.weight:g}"
        cells = (row.method, weight, f"{row.p:g}", str(row.size), row.measure, f"{row.value:.4f}", row.source)
        tables[title].add_row(*cells)
    for table in tables.values():
        out.print(table)
    for note in assessment.notes:
        out.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    for file in assessment.files:
        out.print(str(file.absolute()), markup=False, highlight=False, soft_wrap=True)


@app.command()
def schema(trainable: Annotated[str, typer.Argument(help="Whose settings.")] = "multigrain") -> None:
    """Print the JSON schema of the experiment file, for editors."""
    with clear_errors():
        try:
            found = catalog.find(trainable)
        except LookupError as error:
            raise GrainmillError(str(error)) from error
        print(json.dumps(experiment.json_schema(found), indent=2))


def _mill(file: Path, overrides: Sequence[str] | None, address: str | None, verb: str) -> None:
    with clear_errors():
        checked = _load(file, overrides)
        run_folder.check_name(checked)
        prepare_process()
        out.print("starting Ray and MLflow", style="dim")
        from grainmill.workflows import tune as launch

        uri = tracking_uri(checked.tracking.uri, checked.storage)
        call = launch.tune if verb == "tune" else launch.train
        with Screen(checked) as screen:
            outcome = call(checked, uri, address, screen, show_progress)
        _summarise(checked, outcome, uri)


def _load(file: Path, overrides: Sequence[str] | None) -> Experiment:
    return experiment.load(file, overrides or (), show_progress)


class Screen:
    """Shows the progress: a table that changes in place on a terminal, a line for each event elsewhere."""

    def __init__(self, checked: Experiment) -> None:
        self.metric = next(iter(checked.objective))
        self.epochs = checked.base.epochs
        self.setting: Callable[[TrialRecord], str] = lambda record: _settings(record.setting)
        self.rows: dict[str, tuple[str, ...]] = {}
        self.live = Live(console=out, refresh_per_second=4, get_renderable=self._table) if out.is_terminal else None

    def __enter__(self) -> "Screen":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def message(self, message: str) -> None:
        """A step of the whole begins."""
        out.print(message, style="bold", soft_wrap=True)

    def trial(self, name: str, record: "TrialRecord") -> None:
        """A trial began, finished an epoch, or ended."""
        metrics = record.metrics
        value = f"{metrics[self.metric]:.4f}" if metrics else ""
        row = (name, record.state, f"{int(metrics.get('epoch', 0))}/{self.epochs}", value, self.setting(record))
        self.rows[name] = row
        if not self.live:
            out.print("  ".join(row), soft_wrap=True, highlight=False)

    def _table(self) -> Table:
        table = Table("trial", "state", "epoch", self.metric, "setting")
        for row in list(self.rows.values())[-max(1, out.height - 8) :]:  # the newest that fit on the screen
            table.add_row(*row)
        return table


def _settings(setting: Any) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in setting.items())


def _summarise(checked: Experiment, outcome: "Outcome", uri: str) -> None:
    """The closing table, the report, and how to look at the rest."""
    from grainmill.registry.models import CHALLENGER, CHAMPION
    from grainmill.report.page import comparison, contest, counted

    header, rows = comparison(checked, outcome.records, outcome.winner)
    table = Table(*header, title=counted(outcome.records) if outcome.records else None)
    for row in rows:
        table.add_row(*row, end_section=bool(outcome.records) and row is rows[len(checked.space) - 1])
    out.print(table)
    if len(outcome.candidates) > 1:
        header, rows = contest(checked, outcome.candidates, outcome.winner)
        table = Table(*header, title="the best, trained again from fresh seeds")
        for row in rows:
            table.add_row(*row)
        out.print(table)
    out.print(
        f"model     {outcome.version.uri}, alias {CHAMPION if outcome.champion else CHALLENGER}",
        highlight=False,
        soft_wrap=True,
    )
    if not outcome.champion:
        told = f"grainmill evaluate {outcome.version.uri} --on BENCHMARK=PATH; grainmill promote {outcome.version.uri}"
        out.print(f"promote   {told}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"report    {outcome.report}", highlight=False, soft_wrap=True)
    where = hidden(uri)
    if not uri.startswith("http"):
        where = f"{Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {where}"
    out.print(f"MLflow    {where}", highlight=False, soft_wrap=True)

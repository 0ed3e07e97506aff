"""The command `grainmill`."""

import json
import shlex
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column

from grainmill import api, environment
from grainmill import trainable as catalog
from grainmill.cli import cluster, corpus, registry
from grainmill.cli.console import USAGE_ERROR, Address, File, Overrides, clear_errors, print_table, say
from grainmill.config import experiment
from grainmill.config.addresses import hidden
from grainmill.config.experiment import Experiment
from grainmill.errors import ExperimentError, GrainmillError
from grainmill.progress import setting_text
from grainmill.workflows import run_folder

if TYPE_CHECKING:
    from grainmill.workflows.tune import Outcome

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"grainmill {version('grainmill')}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train, tune and ship MultiGrain image embeddings on Ray."""


@app.command()
def validate(
    file: File,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Check an experiment file and the images that it names; start and write nothing.

    Prints what was found in the images, and warns of what looks like a mistake.

    Example: grainmill validate my.yaml
    """
    with clear_errors():
        try:
            checked = api.load(file, overrides or ())
        except ExperimentError as error:
            if as_json:
                print(json.dumps({"valid": False, "problems": [one._asdict() for one in error.problems]}, indent=2))
                raise typer.Exit(USAGE_ERROR) from error
            raise
        if as_json:
            found = checked.findings
            assert found is not None, "the images were looked at"
            print(json.dumps({"valid": True, "data": found.facts, "warnings": found.warnings}, indent=2))
            return
        for line in checked.found():
            say(line, "yellow" if line.startswith("warning: ") else "")
        say(f"{file} is right. {checked.search.trials} trials of up to {checked.base.epochs} epochs")
        say(f"first trial: {setting_text(checked.reference) or 'the base settings'}")


@app.command()
def tune(
    file: Annotated[Path | None, File.__metadata__[0]] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Carry on the run of this name, without its file.")
    ] = None,
    overrides: Overrides = None,
    address: Address = None,
) -> None:
    """Search, train the best trials again, and register the winner in MLflow.

    The first version of a model becomes its champion, a later one a challenger. Started again, the command carries
    on where it was cut short; a finished run is followed by another.

    Example: grainmill tune my.yaml --set base.epochs=30
    """
    with clear_errors(), ExitStack() as stack:
        if file is None and resume is None:
            raise typer.BadParameter("FILE or --resume NAME is required, got neither")
        if file is not None and resume is not None:
            raise typer.BadParameter("--resume NAME takes the file of the run, so FILE must be left out, got both")
        if resume is not None:
            values = [text.removeprefix("storage=") for text in overrides or () if text.startswith("storage=")]
            storage = values[-1] if values else Experiment.model_fields["storage"].default
            file = stack.enter_context(run_folder.recorded(resume, storage))
        assert file, "one of the two is given"
        _summarise(api.tune(api.load(file, overrides or ()), address=address))


@app.command()
def train(file: File, overrides: Overrides = None, address: Address = None) -> None:
    """Train the base settings once, without a search, and register the model, as tune does.

    Example: grainmill train my.yaml --set resources.retrain_workers=2
    """
    with clear_errors():
        _summarise(api.train(api.load(file, overrides or ()), address=address))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="models:/name@alias, a run's folder, or one with checkpoints.")],
    on: Annotated[list[str], typer.Option("--on", metavar="BENCHMARK=PATH", help="What to evaluate on. Repeatable.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Such as sizes=[224,500] or exponents=[3,4,5]. Repeatable."),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for tables, pictures and pages.")] = Path("evaluation"),
    trainable: Annotated[
        str, typer.Option(help="What made the model in a folder.", autocompletion=catalog.names)
    ] = "multigrain",
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
    """Evaluate a trained model on benchmarks; the MLflow run of a registered model gets the values.

    A model that the evaluation makes becomes a further version of the registered one. The alias champion stays.

    Example: grainmill evaluate models:/demo@champion --on copydays=/data/copydays --set "exponents=[3,4]"
    """
    with clear_errors():
        benchmarks = dict(_benchmark(text) for text in on)
        done = api.evaluate(
            model, benchmarks, overrides or (), out=folder, trainable=trainable, workers=workers, address=address
        )
        result = done.result
        _show_evaluation(result)
        if done.version:
            uri = hidden(environment.tracking_uri())
            say(f"model     {done.version.uri}, serves {result.served}")
            say(f"load      mlflow.set_tracking_uri({uri!r}); mlflow.pyfunc.load_model({done.version.uri!r})")
        elif result.model:
            say(f"model     {shlex.quote(str(result.model.absolute()))}")


def _benchmark(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        example = f"--on {name or 'copydays'}=/data/{name or 'copydays'}"
        raise typer.BadParameter(f"--on needs BENCHMARK=PATH, got {text!r}; add what is missing, such as {example}")
    return name, place


def _show_evaluation(result: catalog.EvaluationResult) -> None:
    """Print the tables, notes and files of an evaluation."""
    for table in result.tables:
        first, *others = table.columns
        print_table((Column(first, overflow="fold"), *others), table.rows, table.title or None)
    for note in result.notes:
        say(note, "yellow")
    for file in result.files:
        say(shlex.quote(str(file.absolute())))


@app.command()
def schema(
    trainable: Annotated[
        str, typer.Argument(help="Trainable whose settings it has.", autocompletion=catalog.names)
    ] = "multigrain",
) -> None:
    """Print the JSON schema of the experiment file, with which editors complete and check it.

    Example: grainmill schema > schema.json
    """
    with clear_errors():
        try:
            found = catalog.find(trainable)
        except LookupError as error:
            raise GrainmillError(str(error)) from error
        print(json.dumps(experiment.json_schema(found), indent=2))


def _summarise(outcome: "Outcome") -> None:
    """Print the closing tables, the model, the report, and how to look at the rest."""
    from grainmill.registry.models import CHALLENGER, CHAMPION
    from grainmill.report.page import comparison, contest, counted

    checked, records, winner, uri = outcome.experiment, outcome.records, outcome.winner, outcome.version.uri
    header, rows = comparison(checked, records, winner)
    print_table(header, rows, counted(records) if records else None, len(checked.space) - 1 if records else -1)
    if len(outcome.candidates) > 1:
        print_table(*contest(checked, outcome.candidates, winner), "the best, trained again from fresh seeds")
    say(f"model     {uri}, alias {CHAMPION if outcome.champion else CHALLENGER}")
    if not outcome.champion:
        commands = f"grainmill evaluate {uri} --on BENCHMARK=PATH; grainmill promote {uri}"
        if outcome.tracking_uri != environment.tracking_uri():
            commands = f"export MLFLOW_TRACKING_URI={shlex.quote(hidden(outcome.tracking_uri))}; {commands}"
        say(f"promote   {commands}")
    say(f"report    {shlex.quote(str(outcome.report))}")
    where = hidden(outcome.tracking_uri)
    if not where.startswith("http"):
        where = shlex.join([str(Path(sys.executable).with_name("mlflow")), "ui", "--backend-store-uri", where])
    say(f"MLflow    {where}")


for _command in (
    *(cluster.plan, cluster.submit),
    *(registry.promote, registry.rollback),
    *(corpus.embed, corpus.find, corpus.duplicates),
):
    app.command()(_command)

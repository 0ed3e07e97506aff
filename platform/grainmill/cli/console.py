"""Output, options, errors and exit codes that all commands share."""

import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from grainmill.errors import ExperimentError, GrainmillError, NameTakenError
from grainmill.progress import cell, err, out, printable

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


def _yaml_files(incomplete: str) -> list[str]:
    """Files and folders that complete the path of an experiment file."""
    return [*glob(f"{incomplete}*.y*ml"), *glob(f"{incomplete}*/")]


File = Annotated[Path, typer.Argument(help="Experiment file, YAML.", metavar="FILE", autocompletion=_yaml_files)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as base.epochs=20. Repeatable."),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to use, such as auto. RAY_ADDRESS by default, else a local Ray is started."),
]


def say(text: str, style: str = "") -> None:
    """Print a text as it is, without breaking its lines."""
    out.print(printable(text), style=style, highlight=False, soft_wrap=True)


def complain(text: str, style: str = "red") -> None:
    """Print a text on stderr."""
    err.print(printable(text), style=style, highlight=False, soft_wrap=True)


def print_table(
    header: Sequence[str | Column], rows: Iterable[Sequence[str]], title: str | None = None, section: int = -1
) -> None:
    """Print a table, with a line below the row number `section`."""
    table = Table(*header, title=title)
    for number, row in enumerate(rows):
        table.add_row(*map(cell, row), end_section=number == section)
    out.print(table)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn an error that the user can correct into its message and an exit code; a defect keeps its traceback."""
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` ends a command as Ctrl-C does
    try:
        yield
    except GrainmillError as error:
        complain(str(error))
        raise typer.Exit(USAGE_ERROR if isinstance(error, ExperimentError | NameTakenError) else FAILURE) from error
    except KeyboardInterrupt:
        complain("interrupted; the same command carries on from here", "yellow")
        raise typer.Exit(INTERRUPTED) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    # Above the progress table, where one is on the screen.
    print(f"warning: {printable(str(message))}", file=sys.stderr)

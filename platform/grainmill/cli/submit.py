"""The command `grainmill submit`."""

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from grainmill import trainable
from grainmill.cli.console import FAILURE, INTERRUPTED, File, Overrides, clear_errors, err, out, prepare_process
from grainmill.config import experiment

JOBS = "~/.cache/grainmill/jobs"
"""What was sent last under each submission id, so that the line that is printed can be run again."""


def submit(
    verb: Annotated[Literal["tune", "train"], typer.Argument(help="What the job does.", metavar="tune|train")],
    file: File,
    address: Annotated[
        str,
        typer.Option(
            help="Dashboard of the cluster's head, such as http://127.0.0.1:8265.", envvar="RAY_API_SERVER_ADDRESS"
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Run tune or train as a job of a Ray cluster, and follow it; the code and the file travel, the data do not.

    The images and the storage folder are the cluster's, and checked there. Ctrl-C leaves the job running. A job that
    failed, or was stopped or lost, carries on when it is submitted again.
    """
    with clear_errors():
        prepare_process()
        from grainmill.cluster import submission

        checked = experiment.load(file, overrides or (), here=False)
        submission.check_storage(checked)
        address = address.rstrip("/")
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray holds it above every --address
        client = submission.connect(address)
        name = submission.next_submission_id(client, address, checked.name)
        jobs = Path(JOBS).expanduser()
        submission.delete_old_packages(jobs, checked.name)
        packed = submission.package_job(file, checked.trainable, trainable.find(checked.trainable), jobs / name)
        left_out = ", ".join(f"{one} ({count})" for one, count in packed.left_out.items())
        _say(f"sending {packed.files} files, {submission.megabytes(packed.bytes)}; left out: {left_out or 'nothing'}")
        line = submission.submit_command(address, name, packed, verb, file, overrides or ())
        _say(shlex.join(line))
        _run(line, name, lambda: submission.job_status(client, name), submission.job_commands(address, name))


def _run(line: list[str], name: str, state_of: Callable[[], Any], advice: str) -> None:
    """Submit a job, follow it, and end with its code; say how to go on where it is not at its end."""
    try:
        subprocess.run(line, check=False)  # its own code is 0 for a job that was stopped, too
        state = state_of()
    except KeyboardInterrupt:
        err.print(f"{name} is left as it is", style="yellow", markup=False, highlight=False)
        _say(advice)
        raise typer.Exit(INTERRUPTED) from None
    if state == "SUCCEEDED":
        return
    if not state.is_terminal():
        err.print(f"{name} is {state.lower()}, but could not be followed", style="yellow", markup=False)
        _say(advice)
    raise typer.Exit(FAILURE)


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)

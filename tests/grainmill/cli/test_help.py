"""The command's help, version and completion."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

from grainmill.cli.app import app

COMMANDS = typer.main.get_command(app).commands


def test_version_is_that_of_the_package():
    assert CliRunner().invoke(app, ["--version"]).output == f"grainmill {version('grainmill')}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_ends_with_an_example_of_it(name):
    *_, last = COMMANDS[name].help.split("\n\n")
    assert last.startswith(f"Example: grainmill {name} ")


@pytest.mark.parametrize(
    ("words", "completed"),
    [("grainmill tune mi", "mine.yaml"), ("grainmill schema multigrain-", "multigrain-exponent")],
)
def test_experiment_files_and_trainables_are_completed(words, completed, tmp_path):
    (tmp_path / "mine.yaml").touch()
    variables = {"_GRAINMILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "2"}
    code = "from grainmill.cli.app import app; app(prog_name='grainmill')"
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert done.stdout.split() == [completed]

"""Commands in processes of their own, and the processes that they leave behind."""

import os
import select
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
"""The repository."""


def python_path():
    """Return `PYTHONPATH` for child processes: they import these modules, and all that this process can import now."""
    return os.pathsep.join([str(SUPPORT), *filter(None, sys.path)])


# Background jobs inherit that SIGINT is ignored; a terminal's foreground does not.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from grainmill.cli.app import app; app()"
)


def start(arguments, folder, mark):
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "GRAINMILL_TEST": mark,
        "COLUMNS": "200",
    }
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def left_behind(mark, seconds=120):
    """Return the ids of the processes with the mark in their environment that have not ended after `seconds`."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                pids.append(int(entry.name))
        except OSError:
            continue
    left = []
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if not select.select([handle], [], [], seconds)[0]:
            left.append(pid)
        os.close(handle)
    return left


def run_whole(script, folder, *words):
    """Run a script in a process of its own. It must print `nothing lost` at its end and leave no process behind."""
    mark = str(uuid.uuid4())
    environment = {**os.environ, "PYTHONPATH": python_path(), "GRAINMILL_TEST": mark}
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder), *map(str, words)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, check=False)
    assert found.stdout.endswith("nothing lost\n"), found.stdout + found.stderr
    assert left_behind(mark) == []


def python(*arguments, **environment):
    """Run Python in the root of the repository and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

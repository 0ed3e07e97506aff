"""Versions that a run is made with: Python, packages, and the commit of the code, which travels with a Ray job."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("grainmill", "mlflow", "optuna", "ray", "torch")
CARRIED = "commit.json"
"""File with the result of `commit`, for places without a repository, such as the folder of a Ray job."""


def environment() -> dict[str, str]:
    """Return the versions of Python and the packages, and the commit of the working directory."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, **commit()}


def commit() -> dict[str, str]:
    """Return the git commit of the working directory, and whether files differ from it; empty if unknown."""
    try:
        dirty = str(bool(_git("status", "--porcelain"))).lower()
        return {"mlflow.source.git.commit": _git("rev-parse", "HEAD"), "git.dirty": dirty}
    except (OSError, subprocess.CalledProcessError):  # not in a repository, or git is not installed
        carried = Path(CARRIED)
        return dict(json.loads(carried.read_text())) if carried.is_file() else {}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

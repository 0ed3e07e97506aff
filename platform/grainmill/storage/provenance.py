"""What a run is made with: Python, packages, and the commit of the code, which a job carries with it."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("grainmill", "mlflow", "optuna", "ray", "torch")
CARRIED = "commit.json"
"""Where there is no repository, such as in a job's folder: what `commit` told where there was one."""


def environment() -> dict[str, str]:
    """Python, packages, and the commit of the working directory."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, **commit()}


def commit() -> dict[str, str]:
    """The git commit of the working directory, and whether files differ from it; empty if none is known."""
    try:
        dirty = str(bool(_git("status", "--porcelain"))).lower()
        return {"mlflow.source.git.commit": _git("rev-parse", "HEAD"), "git.dirty": dirty}
    except (OSError, subprocess.CalledProcessError):  # not in a repository, or no git
        carried = Path(CARRIED)
        return dict(json.loads(carried.read_text())) if carried.is_file() else {}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

"""Folders of runs: `<storage>/<name>/run-1`, `run-2`, `train-1`, ... and who may write there.

A name belongs to one set of settings. Starting it again carries on the last run, if that was cut
short, and begins another if it was finished. One process at a time works under a name.
"""

import difflib
import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grainmill.document import to_yaml
from grainmill.errors import BusyError, NameTakenError, StorageError
from grainmill.experiment import Experiment

WHERE = "# where things are kept, which may change:\n"


def recorded(name: str, storage: Path) -> Path:
    """The experiment file of a name that was used.

    Raises:
        StorageError: it was not.
    """
    file = storage / name / "experiment.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.parent.name for path in storage.glob("*/experiment.yaml"))) or "none"
        raise StorageError(
            f"a run that is carried on must have begun in {storage.absolute()}, but {name!r} has not; known: {known}; "
            "name one of them, or another --set storage=FOLDER"
        )
    return file


def check_name(experiment: Experiment) -> None:
    """Refuse a name that stands for other settings; writes nothing.

    Raises:
        NameTakenError: with the settings that differ.
    """
    record = _home(experiment) / "experiment.yaml"
    if not record.exists():
        return
    before = record.read_text().partition(WHERE)[0].splitlines()
    now = to_yaml(experiment.identity()).splitlines()
    if before != now:
        changes = [
            line for line in difflib.unified_diff(before, now, lineterm="", n=2) if line[:3] not in ("---", "+++")
        ]
        raise NameTakenError(
            f"a name stands for one set of settings, but {experiment.name!r} was used with others in {record.parent}; "
            f"choose another name, for example --set name={experiment.name}-2\n" + "\n".join(changes)
        )


@contextmanager
def claim(experiment: Experiment, kind: str) -> Iterator[Path]:
    """The folder of the run to carry on or to begin; nobody else gets it meanwhile.

    Args:
        experiment: whose name and storage count.
        kind: `run` for a search, `train` for a single training; each is numbered by itself.
    Raises:
        NameTakenError: the name stands for other settings.
        BusyError: another process has it.
        StorageError: the folder cannot be made.
    """
    check_name(experiment)
    home = _home(experiment)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"a run needs a folder to write in, but {home} cannot be made ({error}); set storage"
        ) from error
    with (home / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"one process at a time works under a name, but another has {experiment.name!r} in {home}; "
                "wait for it, or choose another name"
            ) from None
        check_name(experiment)  # again, now that nobody else writes
        where = experiment.model_dump(mode="json", exclude_none=True, include=set(experiment.PLACES))
        _write(home / "experiment.yaml", to_yaml(experiment.identity()) + WHERE + to_yaml(where))
        numbers = [path.name.removeprefix(f"{kind}-") for path in home.glob(f"{kind}-[0-9]*")]
        last = max((int(number) for number in numbers if number.isdecimal()), default=0)
        begin = last == 0 or (home / f"{kind}-{last}" / "done.json").exists()
        folder = home / f"{kind}-{last + begin}"
        folder.mkdir(exist_ok=True)
        yield folder


def finish(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Mark a run as finished, with what came of it."""
    _write(folder / "done.json", json.dumps(outcome, indent=1))


def checkpoints(folder: Path) -> Path | None:
    """Where the checkpoints of the model are that came of a finished run; None of another folder."""
    try:
        return folder / str(json.loads((folder / "done.json").read_text())["checkpoints"])
    except (OSError, ValueError, LookupError):
        return None


def _write(file: Path, text: str) -> None:
    """All of it or nothing."""
    draft = file.with_name(file.name + ".draft")
    draft.write_text(text)
    draft.rename(file)


def _home(experiment: Experiment) -> Path:
    return Path(experiment.storage).absolute() / experiment.name

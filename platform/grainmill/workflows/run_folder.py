"""Folders of runs, `<storage>/<name>/run-1`, `run-2`, `train-1`, ..., and the right to write there.

A name belongs to one set of settings. Starting it again carries on the last run if that was cut short, and begins
another if it was finished. One process at a time works under a name. If the storage is in S3, the process works in a
local copy, and `Run.keep` uploads the changes.
"""

import difflib
import fcntl
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from grainmill.config.experiment import Experiment
from grainmill.config.yaml_document import to_yaml
from grainmill.errors import BusyError, NameTakenError, StorageError
from grainmill.storage import files, lock, workspace
from grainmill.storage.names import check_keys

RECORD = "experiment.yaml"
WHERE = "# where things are kept, which may change:\n"
"""Line between the settings that belong to a name and those that may change."""
FOLDERS_OF_OTHERS = ("trials", "data")
"""Folders below a name that the driver does not copy: those of the trials, and of built-in data."""

_JOB_FILES = "/runtime_resources/working_dir_files/"
"""Part of the path of every folder into which Ray unpacks the files of a job."""


class Run(NamedTuple):
    """Folder of one run."""

    folder: Path
    """Local folder in which this process reads and writes."""
    place: str
    """The same folder for all nodes: a path, or a URL in S3."""
    keep: Callable[[], None]
    """Save the content of the folder where it outlives this machine. Raises StorageError, and BusyError if another
    process has taken over."""


@contextmanager
def recorded(name: str, storage: str) -> Iterator[Path]:
    """Experiment file of a name that was used before; from S3, a copy for the time of the block.

    Raises:
        StorageError: the name was not used.
    """
    storage = workspace.absolute(storage)
    text = workspace.read(f"{storage}/{name}", RECORD)
    if text is None:
        known = ", ".join(sorted(path.parent.name for path in Path(storage).glob(f"*/{RECORD}"))) or "none"
        which = "" if workspace.is_remote(storage) else f"; known: {known}"
        raise StorageError(
            f"a run that is carried on must have begun in {storage}, but {name!r} has not{which}; "
            "name one that has, or another --set storage=FOLDER"
        )
    if not workspace.is_remote(storage):
        yield Path(storage, name, RECORD)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, RECORD)
        file.write_text(text)
        yield file


def check_name(experiment: Experiment) -> None:
    """Refuse a name that was used with other settings; writes nothing.

    Raises:
        NameTakenError: with the settings that differ.
        StorageError: the storage is in the folder into which Ray has unpacked a job.
    """
    home = _home(experiment)
    if _JOB_FILES in home:
        raise StorageError(
            f"storage must outlive the job, but {home} is among the job's files, which Ray deletes; name a path that "
            "all nodes see, for example --set storage=/shared/grainmill-runs, or s3://bucket/prefix"
        )
    record = workspace.read(home, RECORD)
    if record is None:
        return
    before = record.partition(WHERE)[0].splitlines()
    now = to_yaml(experiment.identity()).splitlines()
    if before != now:
        changes = list(difflib.unified_diff(before, now, lineterm="", n=2))[2:]
        raise NameTakenError(
            f"a name stands for one set of settings, but {experiment.name!r} was used with others in {home}; "
            f"choose another name, for example --set name={experiment.name}-2\n" + "\n".join(changes)
        )


@contextmanager
def claim(experiment: Experiment, kind: str, note: Callable[[str], None]) -> Iterator[Run]:
    """Lock the name of an experiment, and yield the run to carry on or to begin.

    Args:
        experiment: its name and storage decide the folder.
        kind: `run` for a search, `train` for a single training; both are numbered separately.
        note: receives a message if the lock takes long.
    Raises:
        NameTakenError: the name was used with other settings.
        BusyError: another process works under the name.
        StorageError: the folder or the bucket cannot be written.
    """
    check_name(experiment)
    place = _home(experiment)
    with _alone(experiment.name, place, note) as check, workspace.opened(place, FOLDERS_OF_OTHERS) as home:
        check_name(experiment)  # again, now that no other process writes
        where = experiment.model_dump(mode="json", exclude_none=True, include=set(experiment.PLACES))
        where["storage"] = workspace.absolute(experiment.storage)  # for another working folder
        files.write_text(home.path / RECORD, to_yaml(experiment.identity()) + WHERE + to_yaml(where))
        numbers = [path.name.removeprefix(f"{kind}-") for path in home.path.glob(f"{kind}-[0-9]*")]
        last = max((int(number) for number in numbers if number.isdecimal()), default=0)
        begin = last == 0 or (home.path / f"{kind}-{last}" / "done.json").exists()
        name = f"{kind}-{last + begin}"
        (home.path / name).mkdir(exist_ok=True)

        def keep() -> None:
            check()
            home.upload()

        keep()
        yield Run(home.path / name, f"{place}/{name}", keep)


@contextmanager
def _alone(name: str, home: str, note: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Make the folder of a name and lock it; yields a function that raises BusyError if the lock was lost."""
    if workspace.is_remote(home):
        with lock.hold(home, repr(name), note) as check:
            yield check
        return
    try:
        Path(home).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"a run needs a folder to write in, but {home} cannot be made ({error}); set storage"
        ) from error
    with Path(home, ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"one process at a time works under a name, but another has {name!r} in {home}; "
                "wait for it, or choose another name"
            ) from None
        yield lambda: None


def finish(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Mark a run as finished, and store its outcome."""
    files.write_text(folder / "done.json", json.dumps(outcome, indent=1))


def checkpoints(place: str) -> str | None:
    """Folder of the checkpoints of a finished run's model; None if `place` is not the folder of a finished run."""
    try:
        found = json.loads(workspace.read(place, "done.json") or "")["checkpoints"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    check_keys(f"{place}/done.json", [str(found)])
    return f"{place}/{found}"


def _home(experiment: Experiment) -> str:
    return f"{workspace.absolute(experiment.storage)}/{experiment.name}"

"""Trainables by name: what the mill knows of what it mills."""

import importlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel

Direction = Literal["max", "min"]
Item = TypeVar("Item")


class Progress(Protocol):
    """Wraps a long loop, given a title and a length, to show its progress."""

    def __call__(self, items: Iterable[Item], title: str, length: int) -> Iterable[Item]: ...


def no_progress(items: Iterable[Item], title: str, length: int) -> Iterable[Item]:  # noqa: ARG001
    """The `Progress` that shows nothing."""
    return items


class Heartbeat(Protocol):
    """What a trainable calls on every worker after each step, and now and then in an evaluation: it is alive.

    Where it returns True, and it does so from then on, the worker must leave: all save a checkpoint at once, and end.
    Of a group's workers some may hear it earlier than others.
    """

    def __call__(self) -> bool: ...


def no_heartbeat() -> bool:
    """The `Heartbeat` of a training that nobody watches."""
    return False


Pin = tuple[int, str]
"""Size in bytes and ETag: the only version of an object in S3 that will do."""


class Objects(Protocol):
    """Objects in S3, read one by one; can be pickled. Methods raise ValueError if S3 cannot be read."""

    def names(self) -> Sequence[str]:
        """List the objects; names are relative to the prefix."""

    def read(self, name: str) -> bytes:
        """Read an object, in any thread."""


class Mirror(Protocol):
    """Copies of `s3://` sources on this machine's disk.

    Methods raise ValueError if something cannot be read or stored; its arguments are the problems, a sentence each.
    """

    def fetch(self, source: str, progress: Progress) -> Path:
        """Return the local path of a file or folder; what is in S3 and not yet on this machine is read first."""

    def fetch_objects(self, wanted: Mapping[str, Pin | None], progress: Progress) -> None:
        """Read single objects by URL, some of them pinned; afterwards objects that do not exist have no file."""

    def path(self, url: str) -> Path:
        """Return the local path of an object."""

    def url(self, path: Path) -> str | None:
        """Return the URL of the object at a local path; None if the file is no copy of an object."""

    def named(self, text: str) -> str:
        """Replace local paths of objects in a text by URLs."""

    def pins(self, paths: Iterable[Path]) -> Mapping[Path, tuple[str, Pin]]:
        """Return URL and version of those files that are copies of objects."""


class Files(Protocol):
    """Access to data in S3, which the platform hands to a trainable; one instance for each run."""

    @property
    def listings(self) -> MutableMapping[Any, Any]:
        """What a trainable has listed, by its settings: kept here, data are listed once in a run."""

    def mirror(self, cache: str, limit: float | None) -> Mirror:
        """Return the copies below the folder `cache`, which may take `limit` GB, by default half of the disk."""

    def objects(self, source: str) -> Objects:
        """Return the objects below `s3://bucket/prefix`. Raises ValueError if that is not a valid URL."""


class EpochResult(Protocol):
    """What a trainable yields after each epoch."""

    @property
    def epoch(self) -> int:
        """Epochs finished, from 1."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Among them, in every epoch, the metrics that an objective can name."""

    @property
    def variants(self) -> Mapping[str, Mapping[str, float]]:
        """After the last epoch, metrics of the trained model at other settings of its evaluation, by name."""


class Measurement(Protocol):
    """One measured value of an evaluation, with its 95 % interval."""

    name: str
    """Letters, digits and `_-. :/` only, as MLflow requires."""
    value: float
    low: float
    high: float


class ResultTable(Protocol):
    """A table to show to users; all cells are text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class QueryScores(Protocol):
    """The score of each query, whose mean is a measure, to compare two models query by query."""

    name: str
    """Letters, digits and `_-. /` only."""
    data: str
    """Digest of the data. Scores with equal digests are of the same queries, in the same order."""
    values: Sequence[float]
    """One for each query or image; larger is better."""
    served: bool
    """True for scores of `EvaluationResult.model`, False for scores of the model that was evaluated."""


class EvaluationResult(Protocol):
    """The result of an evaluation; it can be pickled."""

    measurements: Sequence[Measurement]
    tables: Sequence[ResultTable]
    """Tables for the terminal, in their order."""
    notes: Sequence[str]
    """Sentences on the conditions of the measurements, such as missing images."""
    files: Sequence[Path]
    model: Path | None
    """Folder of a model that the evaluation made and `load` reads; None if the settings ask for none."""
    served: str | None
    """Name of the setting that this model serves, such as `500/p4-whitened`."""
    query_scores: Sequence[QueryScores]


class DataPart(Protocol):
    """Data that models are trained or judged on."""

    name: str
    """Of its part in the whole, such as `val`."""
    role: Literal["training", "evaluation"]
    digest: str
    """At most 36 characters, the same for the same data wherever they are."""
    rows: int
    where: str


class Predictor(Protocol):
    """A trained model, from table to table.

    One that embeds takes a column `image` of bytes, and answers, row for row, with `embedding` (floats of unit norm),
    `class_id`, `class_name`, `score`, and `error`: why a row has no answer, None where it has one.
    """

    def __call__(self, table: Any) -> Any: ...


class Images(Protocol):
    """The images of a corpus; it can be pickled."""

    def names(self) -> Sequence[str]:
        """Each image once, in a fixed order. Raises ValueError if they cannot be listed."""

    def read(self, name: str) -> bytes:
        """The content of an image, in any thread. Raises ValueError with the reason why it cannot be read."""


class Trainable(Protocol):
    """A module with these names, known by an entry point `grainmill.trainables` or by its dotted path."""

    Spec: type[BaseModel]
    """Settings of one run, frozen, each with the published default; among them `epochs` and `seed`."""
    Data: type[BaseModel]
    """Where the data are."""
    Evaluation: type[BaseModel]
    """On what, and how, a trained model is evaluated."""

    @staticmethod
    def metrics(data: Any, files: Files) -> Mapping[str, Direction]:
        """The metrics that an objective can name, and which way is better. Raises ValueError if they do not tell."""

    @staticmethod
    def data_problems(data: Any, progress: Progress, files: Files) -> list[str]:
        """What is wrong with the data on disk, one sentence each."""

    @staticmethod
    def worker_problems(spec: Any, workers: int) -> list[str]:
        """What keeps a valid spec from running on so many workers, one sentence each."""

    @staticmethod
    def prepare(data: Any, root: Path, progress: Progress, files: Files) -> Any:
        """Write built-in data below `root`; returns the settings to train with. Called once, before all trials.

        Where the storage is in S3, a setting that names something below `root` then gets its `s3://` URL.
        """

    @staticmethod
    def sources(data: Any, files: Files) -> Sequence[DataPart]:
        """The parts of prepared data."""

    @staticmethod
    def fit(spec: Any, data: Any, folder: Path, heartbeat: Heartbeat, files: Files) -> Iterator[EpochResult]:
        """Train, on every worker alike; goes on from the checkpoints in `folder`, an epoch's result that is kept first.

        Ends before its last epoch, with all steps kept, where `heartbeat` says so on any worker.

        What is being written there has a name that begins with `.` or `draft` or ends in `.draft`, and gets its own
        when it is whole: all else may be copied at any moment. One process writes, or all write the same.
        """

    @staticmethod
    def load(folder: Path) -> Predictor:
        """The model that `fit` left in `folder`, or that is the `checkpoint` of an export."""

    @staticmethod
    def export(folder: Path, out: Path) -> Mapping[str, Any]:
        """Write the model that `fit` left in `folder` to a new folder `out` that needs none of our packages to load.

        There, `model.py` holds `load(folder)`, which returns a `Predictor` and refuses, with ValueError, files that
        are not in `MANIFEST.json` as {name: {"bytes": size, "sha256": digest}}; `requirements.txt` names what that
        needs; `signature.json` has the columns `inputs` and `outputs`, as MLflow notes them; `checkpoint/` is a folder
        for `load` and `evaluate`. No file is a pickle. Returns facts about the model, by name, for its users.
        """

    @staticmethod
    def evaluate(folder: Path, settings: Any, out: Path, files: Files) -> EvaluationResult:
        """Evaluate the model that `fit` left in `folder`, writing files to `out`. Raises ValueError if it cannot.

        Called on every worker alike, with a process group if there are several; that of rank 0 is kept.
        """

    @staticmethod
    def images(source: str, files: Files) -> Images:
        """The images of a corpus. Raises ValueError if `source` names none."""

    @staticmethod
    def example(data: Any, files: Files) -> Any:
        """A small table that a `Predictor` takes."""


MEMBERS = (
    *("Spec", "Data", "Evaluation"),
    *("metrics", "data_problems", "worker_problems", "prepare", "sources", "fit"),
    *("load", "export", "evaluate", "images", "example"),
)


def names() -> list[str]:
    """The installed trainables."""
    return sorted(entry.name for entry in entry_points(group="grainmill.trainables"))


def find(name: str) -> Trainable:
    """A trainable by its name, or the module that a dotted path names.

    Raises:
        LookupError: there is no such trainable, or the module is none.
    """
    for entry in entry_points(group="grainmill.trainables", name=name):
        return entry.load()
    try:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ModuleNotFoundError(name=name)
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, but not what it imports
        raise LookupError(
            f"a trainable must be installed or be a module's dotted path, got {name!r}; installed: {', '.join(names())}"
        ) from None
    if missing := [needed for needed in MEMBERS if not hasattr(module, needed)]:
        raise LookupError(f"a trainable must have {', '.join(MEMBERS)}; the module {name} lacks {', '.join(missing)}")
    return module  # type: ignore[return-value]

"""The protocol between the platform and the methods that it trains, and the look-up of a method by its name.

A trainable is a module with the names of `Trainable`. Its records need only have the attributes of the protocols here.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol, TypeVar, cast

from pydantic import BaseModel

Direction = Literal["max", "min"]
Item = TypeVar("Item")


class Progress(Protocol):
    """Wraps the items of a long loop to show its progress, given a title and the number of items."""

    def __call__(self, items: Iterable[Item], title: str, length: int) -> Iterable[Item]: ...


def no_progress(items: Iterable[Item], title: str, length: int) -> Iterable[Item]:  # noqa: ARG001
    """Return the items as they are: the `Progress` that shows nothing."""
    return items


Heartbeat = Callable[[], bool]
"""Function that a trainable calls on every worker after each step, and between the batches of an evaluation.

It shows that the worker is alive. When it returns True, which it does from then on, all workers must save a checkpoint
at once and end; some workers of a group may be told earlier than others.
"""


Pin = tuple[int, str]
"""Size in bytes and ETag of an object in S3, which name its only acceptable version."""


class Objects(Protocol):
    """Objects in S3, which are listed once and read one by one; they can be pickled, without the list."""

    def pins(self) -> Mapping[str, Pin]:
        """List the objects, in a fixed order. Raises ValueError if they cannot be listed."""

    def read(self, name: str, most: int) -> bytes:
        """Return the content, in any thread. Raises ValueError if it has more than `most` bytes or cannot be read."""


class Listing(Protocol):
    """The images of a corpus, and what its folder holds besides."""

    names: Sequence[str]
    """The images, each once, in a fixed order."""
    left_out: Mapping[str, str]
    """Names of what is left out, such as files of types that are not read, with the reason: a predicate."""
    litter: int
    """Number of hidden files and folders, and of those that systems leave behind, which are left out, too."""


class Images(Protocol):
    """Images of a corpus, which are read one by one; they can be pickled."""

    def listing(self) -> Listing:
        """List the images. Raises ValueError if they cannot be listed."""

    def versions(self, names: Sequence[str]) -> Mapping[str, tuple[int, str]]:
        """Return size in bytes and a text, such as an ETag, of each image that is there; they change with the content.

        Raises ValueError if the images cannot be listed.
        """

    def read(self, name: str) -> bytes:
        """Return the content of an image, in any thread. Raises ValueError with the reason if it cannot be read."""


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
        """Return URL and version of the files that are copies of objects."""


class Files(Protocol):
    """Access to data in S3, which the platform hands to a trainable; one instance for each run."""

    @property
    def listings(self) -> MutableMapping[Any, Any]:
        """Lists of data that a trainable has made, by their settings, so that data are listed once in a run."""

    def mirror(self, cache: str, limit: float | None) -> Mirror:
        """Return the copies below the folder `cache`, which may take `limit` GB, by default half of the disk."""

    def objects(self, source: str) -> Objects:
        """Return the objects below `s3://bucket/prefix`. Raises ValueError if that is not a valid URL."""


class Findings(Protocol):
    """Findings in valid data."""

    figures: Mapping[str, str]
    """Lines to show: a word and what was counted."""
    warnings: Sequence[str]
    """Sentences on what will probably not give what the user expects."""
    facts: Mapping[str, Any]
    """Plain data to record."""


class EpochResult(Protocol):
    """The result that a trainable yields after each epoch."""

    epoch: int
    """Number of finished epochs, from 1."""
    metrics: Mapping[str, float]
    """Metrics by name; in every epoch, they include those that an objective can name."""
    variants: Mapping[str, Mapping[str, float]]
    """After the last epoch, metrics of the trained model at other settings of its evaluation, by the setting's name."""


class Measurement(Protocol):
    """A measured value of an evaluation, with its 95 % interval."""

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
    """A score for each query or image; larger is better."""
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
    """A part of the data on which models are trained or evaluated."""

    name: str
    """Name of the part, such as `val`."""
    role: Literal["training", "evaluation"]
    digest: str
    """Digest of at most 36 characters, the same for the same data at any place."""
    rows: int
    where: str


class Predictor(Protocol):
    """A trained model, from table to table.

    A model that embeds takes a column `image` of bytes. For each row it returns `embedding` (floats of unit norm),
    `class_id`, `class_name`, `score`, and `error`: the reason why a row has no answer, else None.
    """

    def __call__(self, table: Any) -> Any: ...


class Trainable(Protocol):
    """A module with these names, known by an entry point `grainmill.trainables` or by its dotted path.

    It may leave out the names in `DEFAULTS`.
    """

    Spec: type[BaseModel]
    """Settings of one run, frozen, each with the published default; among them `epochs` and `seed`."""
    Data: type[BaseModel]
    """Settings that say where the data are."""
    Evaluation: type[BaseModel]
    """Settings of an evaluation of a trained model."""

    @staticmethod
    def metrics(data: Any, files: Files) -> Mapping[str, Direction]:
        """Return the metrics that an objective can name, and which way is better.

        Raises ValueError if the data do not say which metrics they allow.
        """

    @staticmethod
    def query_measures() -> Mapping[str, Sequence[str]]:
        """Return the benchmarks, and the measures of each that have a score for each query; empty if unknown.

        The name of such scores begins with the benchmark and ends with the measure.
        """

    @staticmethod
    def data_problems(data: Any, progress: Progress, files: Files) -> list[str]:
        """Check the data on disk; return a sentence on each problem."""

    @staticmethod
    def findings(data: Any, spec: Any, progress: Progress, files: Files) -> Findings:
        """Count what is in data without problems, and warn of what looks like a mistake, for a training with `spec`."""

    @staticmethod
    def worker_problems(spec: Any, workers: int) -> list[tuple[str, str]]:
        """Check that a valid spec can run on this number of workers.

        Returns:
            The setting that causes each problem, such as `model.weights`, or "" if it is the number of workers; and a
            sentence, without the setting as its subject.
        """

    @staticmethod
    def prepare(data: Any, root: Path, progress: Progress, files: Files) -> Any:
        """Write built-in data below `root`, and return the settings to train with. Called once, before all trials.

        If the storage is in S3, settings that name something below `root` then get its `s3://` URL.
        """

    @staticmethod
    def sources(data: Any, files: Files) -> Sequence[DataPart]:
        """Return the parts of prepared data."""

    @staticmethod
    def fit(spec: Any, data: Any, folder: Path, heartbeat: Heartbeat, files: Files) -> Iterator[EpochResult]:
        """Train on every worker, and continue from the checkpoints in `folder`; the last stored result comes first.

        Training ends before its last epoch, with all steps stored, when `heartbeat` says so on any worker.

        A file or folder that is being written there has a name that begins with `.` or `draft` or ends in `.draft`,
        and is renamed when it is whole, so that everything else can be copied at any moment. Either one process
        writes, or all write the same.
        """

    @staticmethod
    def load(folder: Path) -> Predictor:
        """Load the model that `fit` left in `folder`, or the `checkpoint` of an export.

        The folder may be deleted afterwards.
        """

    @staticmethod
    def export(folder: Path, out: Path) -> Mapping[str, Any]:
        """Write the model that `fit` left in `folder` to a new folder `out`, which can be loaded without Grainmill.

        There, `model.py` holds `load(folder)`, which returns a `Predictor` and refuses, with ValueError, files that
        are not in `MANIFEST.json` as {name: {"bytes": size, "sha256": digest}}; `requirements.txt` lists what that
        needs; `signature.json` has the columns `inputs` and `outputs` in MLflow's form; `checkpoint/` is a folder
        for `load` and `evaluate`. No file is a pickle. Returns facts about the model, by name, for its users.
        """

    @staticmethod
    def evaluate(folder: Path, settings: Any, out: Path, files: Files) -> EvaluationResult:
        """Evaluate the model that `fit` left in `folder`, and write files to `out`. Raises ValueError if it cannot.

        Called on every worker, with a process group if there are several; the result of rank 0 is used.
        """

    @staticmethod
    def images(source: str, files: Files) -> Images:
        """Return the images of a corpus. Raises ValueError if `source` names none."""

    @staticmethod
    def example(data: Any, files: Files) -> Any:
        """Return a small table that a `Predictor` takes."""


REQUIRED = ("Spec", "Data", "metrics", "sources", "fit", "load", "export", "example")


class NoSettings(BaseModel, frozen=True, extra="forbid"):
    """Settings of an evaluation for a trainable that has none."""


def _refuse(reason: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise ValueError(reason)

    return refuse


DEFAULTS: Mapping[str, Any] = {
    "Evaluation": NoSettings,
    "query_measures": dict,
    "data_problems": lambda *_: [],
    "findings": lambda *_: SimpleNamespace(figures={}, warnings=(), facts={}),
    "worker_problems": lambda _, workers: (
        [] if workers == 1 else [("", f"this trainable trains on 1 worker, got {workers}")]
    ),
    "prepare": lambda data, *_: data,
    "evaluate": _refuse("this trainable has no benchmarks; compare its versions by the metrics of their training"),
    "images": _refuse("this trainable embeds no images; use one that does, such as multigrain"),
}
"""Stand-ins for names of `Trainable` that a module leaves out."""


def names() -> list[str]:
    """Return the names of the installed trainables."""
    return sorted(entry.name for entry in entry_points(group="grainmill.trainables"))


def find(name: str) -> Trainable:
    """Return an installed trainable by its name, or the module that a dotted path names, completed from `DEFAULTS`.

    Raises:
        LookupError: there is no such trainable, or the module lacks names of `REQUIRED`.
    """
    installed = [entry.load() for entry in entry_points(group="grainmill.trainables", name=name)]
    module = installed[0] if installed else _import(name)
    if missing := [needed for needed in REQUIRED if not hasattr(module, needed)]:
        raise LookupError(f"a trainable must have {', '.join(REQUIRED)}; the module {name} lacks {', '.join(missing)}")
    absent = {name: default for name, default in DEFAULTS.items() if not hasattr(module, name)}
    return cast("Trainable", SimpleNamespace(**vars(module), **absent) if absent else module)


def _import(name: str) -> Any:
    try:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ModuleNotFoundError(name=name)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, but not what it imports
        raise LookupError(
            f"a trainable must be installed or be a module's dotted path, got {name!r}; installed: {', '.join(names())}"
        ) from None

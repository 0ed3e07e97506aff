"""Hooks that a caller passes to long-running work: to show its progress, to stop it, and to read data in S3.

The method itself reads local files only. `Files`, which Grainmill implements, gives it local copies of `s3://` sources.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from multigrain.errors import DataError

Item = TypeVar("Item")


class Progress(Protocol):
    """Wraps the items of a long loop to show its progress, given a title and the number of items."""

    def __call__(self, items: Iterable[Item], title: str, length: int) -> Iterable[Item]: ...


def no_progress(items: Iterable[Item], title: str, length: int) -> Iterable[Item]:  # noqa: ARG001
    """Return the items as they are: the `Progress` that shows nothing."""
    return items


Heartbeat = Callable[[], bool]
"""Called by a training after each step, and between the batches of an evaluation.

It returns True, from then on always, when the caller must save a checkpoint at once and end.
"""


def no_heartbeat() -> bool:
    """Return False: the `Heartbeat` of a training that nothing watches."""
    return False


class EndedError(Exception):
    """An evaluation was cut short on all ranks, because the heartbeat of one rank returned True."""


SCHEME = "s3://"
Pin = tuple[int, str]
"""Size in bytes and ETag: the only version of an object in S3 that will do."""


class Objects(Protocol):
    """Objects in S3 below a prefix, listed once and read one by one by their names, up to a size."""

    def pins(self) -> Mapping[str, Pin]: ...
    def read(self, name: str, most: int) -> bytes: ...


class Mirror(Protocol):
    """Copies of `s3://` sources on this machine's disk; see `LocalFiles` for the methods.

    They raise ValueError if something cannot be read or stored; its arguments are the problems, a sentence each.
    """

    def fetch(self, source: str, progress: Progress) -> Path: ...
    def fetch_objects(self, wanted: Mapping[str, Pin | None], progress: Progress) -> None: ...
    def path(self, url: str) -> Path: ...
    def url(self, path: Path) -> str | None: ...
    def named(self, text: str) -> str: ...
    def pins(self, paths: Iterable[Path]) -> Mapping[Path, tuple[str, Pin]]: ...


class Files(Protocol):
    """Access to data in S3; `listings` keeps what was listed through it, by its settings."""

    @property
    def listings(self) -> MutableMapping[Any, Any]: ...
    def mirror(self, cache: str, limit: float | None) -> Mirror: ...
    def objects(self, source: str) -> Objects: ...


class LocalFiles:
    """The `Files` and the `Mirror` of a process without Grainmill: local paths only."""

    def __init__(self) -> None:
        self.listings: dict[Any, Any] = {}

    def mirror(self, cache: str, limit: float | None) -> Mirror:
        """Return the local copies of `s3://` sources, of which there are none."""
        return self

    def objects(self, source: str) -> Objects:
        """Refuse to read objects one by one."""
        _refuse()

    def fetch(self, source: str, progress: Progress = no_progress) -> Path:
        """Return the local path of a file or folder."""
        return self.path(source) if source.startswith(SCHEME) else Path(source)

    def fetch_objects(self, wanted: Mapping[str, Pin | None], progress: Progress = no_progress) -> None:
        """Make local copies of single objects, given by URL, some with the only version that will do."""
        if wanted:
            _refuse()

    def path(self, url: str) -> Path:
        """Return the path of the local copy of an object."""
        _refuse()

    def url(self, path: Path) -> str | None:
        """Return the URL of the object that a local file is a copy of; None if it is no copy."""
        return None

    def named(self, text: str) -> str:
        """Replace the paths of local copies in a text by URLs."""
        return text

    def pins(self, paths: Iterable[Path]) -> Mapping[Path, tuple[str, Pin]]:
        """Return URL and version of those files that are local copies."""
        return {}


def _refuse() -> NoReturn:
    raise DataError(["data in s3:// need Grainmill, but the method runs without it; copy them to a local folder"])


@contextmanager
def data_errors() -> Iterator[None]:
    """Turn the ValueError of a `Mirror` or of `Objects` into a DataError."""
    try:
        yield
    except DataError:
        raise
    except ValueError as error:
        raise DataError([*map(str, error.args)]) from error.__cause__

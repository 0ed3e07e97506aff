"""Folders that all nodes see: of a file system, or kept in S3, where each process works in a copy of its own.

In S3 a folder has an object beside its files, `.index.json`, which names those that belong to it. It is written after
them and before others are deleted, so a reader sees the folder as it was at the end of some `push`, and what a process
that died had begun to write is nobody's; the next push clears it away. A folder without an index, such as one that was
copied there by hand, consists of all that lies there.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from grainmill.errors import StorageError
from grainmill.storage import s3
from grainmill.storage.s3 import S3Entry, S3Prefix

INDEX = ".index.json"
WORK = "~/.cache/grainmill/.work"
"""Where the copies are; those of processes that died are deleted by the next."""
_UNFINISHED = re.compile(r"\.|draft|.*\.draft$")
"""Names of files and folders that are being written; all others are whole."""
POLL_SECONDS = 1.0
_TRIES = 5
"""Readings of a folder that changes meanwhile."""


class _Stamp(NamedTuple):
    """Tells one content of a file from another."""

    size: int
    time: int
    inode: int


class Folder:
    """A folder of a file system that all nodes see: nothing is to be done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def push(self) -> None:
        """See to it that all nodes see what is in the folder, or get it later."""

    @contextmanager
    def followed(self) -> Iterator[None]:
        """`push` whatever appears during the block, and what is left at its end."""
        yield


class Vault(Folder):
    """A copy of a folder in S3. Several processes may have one; only those that change something write."""

    def __init__(self, store: S3Prefix, path: Path, besides: Collection[str]) -> None:
        super().__init__(path)
        self._store, self._besides = store, besides
        self._etag: str | None = None
        """Of the index, as we know it."""
        self._known: dict[str, _Stamp] = {}
        """Files that are in the bucket as they are here."""
        self._strays: set[str] = set()
        """S3Prefix that do not belong to the folder."""
        self._me = str(uuid4())
        self._one_at_a_time = threading.Lock()

    def fetch(self) -> None:
        """Make the empty folder equal to what is in the bucket.

        Raises:
            StorageError: it cannot be read, it changes all the time, or this disk is too small.
        """
        for _ in range(_TRIES):
            self._etag, names, there = self._look()
            if names <= there.keys():
                break
        else:
            raise StorageError(
                f"{self._store.url} must have all that its {INDEX} names, but lacks "
                f"{min(names - there.keys())}; put it back, or delete the index"
            )
        needed, free = sum(there[name].size for name in names), shutil.disk_usage(self.path).free
        if needed > free:
            raise StorageError(
                f"{self._store.url} needs {needed / 1e9:.2f} GB free in {self.path.parent}, got {free / 1e9:.2f}; "
                "free some, or let the home folder be on a larger disk"
            )
        for folder in {(self.path / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(s3.REQUESTS) as pool:
            list(pool.map(lambda name: self._store.download(there[name], self.path / name), names))
        self._known, self._strays = self._whole(), there.keys() - names

    def push(self) -> None:
        """Bring the bucket up to what is in the folder: all of it, or for a reader nothing of it.

        Raises:
            StorageError: the bucket does not take it.
            FileNotFoundError: a file went meanwhile.
        """
        self._push(self._store)

    def _push(self, store: S3Prefix) -> None:
        with self._one_at_a_time:
            found = self._whole()
            if found == self._known:
                return
            for _ in range(_TRIES):
                if self._bring(store, found):
                    return
                # Another process has written: one that was taken for dead, or that has taken us for it. Both do the
                # same work, so ours is as good.
                self._etag, _, there = self._look()
                self._known, self._strays = {}, set(there)
            raise StorageError(f"one process at a time writes to {store.url}, but another does, too; end it")

    @contextmanager
    def followed(self) -> Iterator[None]:
        """See `Folder`. What goes wrong shows at the next `push`, which tries again."""
        over, store = threading.Event(), self._store.impatient()

        def follow() -> None:
            while not over.wait(POLL_SECONDS):
                with suppress(StorageError, FileNotFoundError):
                    self._push(store)

        thread = threading.Thread(target=follow, name="vault", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with suppress(StorageError, FileNotFoundError):  # an error that ends the block is the one to tell
                self._push(store)

    def _look(self) -> tuple[str | None, set[str], dict[str, S3Entry]]:
        """The index's ETag, the names of the files, and all objects that could be some."""
        index = self._store.get(INDEX)
        there = {name: one for name, one in self._store.listed().items() if self._ours(name)}
        if index is None:
            return None, set(there), there
        return index.etag, set(json.loads(index.body)["files"]), there

    def _bring(self, store: S3Prefix, found: Mapping[str, _Stamp]) -> bool:
        """Whether it worked; not if somebody else has written the index."""
        if self._etag is None and not self._point(store, self._known):  # from here on, what is not named does not count
            return False
        changed = [name for name, stamp in found.items() if self._known.get(name) != stamp]
        self._strays.update(changed)
        with ThreadPoolExecutor(s3.REQUESTS) as pool:
            list(pool.map(lambda name: store.upload(name, self.path / name), changed))
        if not self._point(store, found):
            return False
        self._strays.update(self._known)
        self._known = dict(found)
        for name in sorted(self._strays - found.keys()):
            store.delete(name)
        self._strays.clear()
        return True

    def _point(self, store: S3Prefix, names: Iterable[str]) -> bool:
        body = json.dumps({"files": sorted(names), "writer": self._me}, indent=1).encode()
        etag = store.put(INDEX, body, self._etag)
        self._etag = etag or self._etag
        return etag is not None

    def _ours(self, name: str) -> bool:
        return not any(_UNFINISHED.match(part) or part in self._besides for part in name.split("/"))

    def _whole(self) -> dict[str, _Stamp]:
        """The files that are no drafts, by name."""
        found = {}
        for place, folders, names in os.walk(self.path):
            folders[:] = filter(self._ours, folders)
            for file in (Path(place, name) for name in names if self._ours(name)):
                with suppress(FileNotFoundError):  # it went meanwhile
                    state = file.stat()
                    stamp = _Stamp(state.st_size, state.st_mtime_ns, state.st_ino)
                    found[file.relative_to(self.path).as_posix()] = stamp
        return found


def remote(place: str) -> bool:
    """Whether a place is in S3; else it is a folder."""
    return place.startswith(s3.SCHEME)


def problem(place: str) -> str | None:
    """What is wrong with the name of a place, in words."""
    scheme, rest, _ = place.partition("://")
    if rest and not remote(place):
        return f"must be a folder or s3://bucket/prefix, got one that begins with {scheme}://; change it"
    return s3.problem(place) if remote(place) else None


def absolute(place: str) -> str:
    """A place as every process can name it."""
    return place.rstrip("/") if remote(place) else str(Path(place).absolute())


def uri(place: str) -> str:
    """A place as a URI."""
    return absolute(place) if remote(place) else Path(place).absolute().as_uri()


@contextmanager
def opened(place: str, besides: Collection[str] = (), within: Path | None = None) -> Iterator[Folder]:
    """The folder at a place: itself, or a copy for the time of the block.

    Args:
        place: a path, or `s3://bucket/prefix`.
        besides: names of folders in it that are no part of it.
        within: folder for the copy; one of this machine by default.
    Raises:
        StorageError: it cannot be read.
    """
    if not remote(place):
        yield Folder(Path(place))
        return
    with s3.opened(place) as store, _workspace(within or Path(WORK).expanduser()) as work:
        path = work / store.url.rpartition("/")[2]  # a training may go by the name of its folder
        path.mkdir()
        vault = Vault(store, path, besides)
        vault.fetch()
        yield vault


def read(place: str, name: str) -> str | None:
    """The text of one file of a place, None if it is not there.

    Raises:
        StorageError: S3 does not answer, or not as it should.
    """
    if remote(place):
        with s3.opened(place, patience=0) as store:
            found = store.get(name)
        return found and found.body.decode()
    try:
        return Path(place, name).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def _workspace(root: Path) -> Iterator[Path]:
    """An empty folder, which goes at the end of the block; one whose process died goes with the next process's."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        for left in root.glob("*/.lock"):
            with left.open("w") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left.parent, ignore_errors=True)
        path = Path(tempfile.mkdtemp(dir=root))
        lock = (path / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.close()

"""Folders that all nodes can reach: in a shared file system, or in S3, where each process works in a local copy.

A folder in S3 has an index object, `.index.json`, that names its files. The index is written after new files and before
old ones are deleted, so a reader sees the folder as it was after some `upload`. Objects that a killed process left are
not in the index; the next upload deletes them. A folder without an index, such as one that was copied to S3 by hand,
consists of all objects below its prefix.
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
from uuid import uuid4

from grainmill.errors import StorageError
from grainmill.storage import s3
from grainmill.storage.names import check_keys
from grainmill.storage.s3 import S3Entry, S3Prefix

INDEX = ".index.json"
WORK = "~/.cache/grainmill/.work"
"""Folder of local copies and other temporary files; those of dead processes are deleted by the next process."""
_UNFINISHED = re.compile(r"\.(?!\.?$)|draft|.*\.draft$")
"""Names of files and folders that are being written; all others are complete, or refused as `.` and `..` are."""
POLL_SECONDS = 1.0
_TRIES = 5
"""Attempts to read or write a folder that other processes change at the same time."""

_Stamp = tuple[int, int, int]
"""Size, time of modification and inode of a file: they differ after each change of its content."""


class LocalWorkspace:
    """A folder in a file system that all nodes share; nothing is copied."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def upload(self) -> None:
        """Make the content of the folder available to all nodes."""

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Upload new files during the block, and the remaining ones at its end."""
        yield


class S3Workspace(LocalWorkspace):
    """A local copy of a folder in S3. Several processes may have one; only processes with changes write to S3."""

    def __init__(self, store: S3Prefix, path: Path, excluded: Collection[str]) -> None:
        super().__init__(path)
        self._store, self._excluded = store, excluded
        self._etag: str | None = None
        """ETag of the index, as last read or written."""
        self._known: dict[str, _Stamp] = {}
        """Files that are the same in S3 as here."""
        self._strays: set[str] = set()
        """Objects that are no part of the folder."""
        self._writer = str(uuid4())
        self._one_at_a_time = threading.Lock()

    def download(self) -> None:
        """Fill the empty local folder with the files from S3.

        Raises:
            StorageError: S3 cannot be read, the folder keeps changing, or the disk is too small.
        """
        for _ in range(_TRIES):
            self._etag, names, entries = self._list()
            if names <= entries.keys():
                break
        else:
            raise StorageError(
                f"{self._store.url} must have all that its {INDEX} names, but lacks "
                f"{min(names - entries.keys())}; put it back, or delete the index"
            )
        needed, free = sum(entries[name].size for name in names), shutil.disk_usage(self.path).free
        if needed > free:
            raise StorageError(
                f"{self._store.url} needs {needed / 1e9:.2f} GB free in {self.path.parent}, got {free / 1e9:.2f}; "
                "free some, or let the home folder be on a larger disk"
            )
        for folder in {(self.path / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(s3.REQUESTS) as pool:
            list(pool.map(lambda name: self._store.download(entries[name], self.path / name), names))
        self._known, self._strays = self._finished_files(), entries.keys() - names

    def upload(self) -> None:
        """Copy all changes to S3: readers see all of them or none.

        Raises:
            StorageError: S3 cannot be written.
            FileNotFoundError: a file was deleted meanwhile.
        """
        self._upload(self._store)

    def _upload(self, store: S3Prefix) -> None:
        with self._one_at_a_time:
            files = self._finished_files()
            if files == self._known:
                return
            check_keys(str(self.path), files)  # no other process could read them
            for _ in range(_TRIES):
                if self._write(store, files):
                    return
                # Another process has written: one of the two was taken for dead. Both do the same work, so either
                # result will do.
                self._etag, _, entries = self._list()
                self._known, self._strays = {}, set(entries)
            raise StorageError(f"one process at a time writes to {store.url}, but another does, too; end it")

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Upload new files during the block. An error shows at the next `upload`, which tries again."""
        over, store = threading.Event(), self._store.impatient()

        def follow() -> None:
            while not over.wait(POLL_SECONDS):
                with suppress(StorageError, FileNotFoundError):
                    self._upload(store)

        thread = threading.Thread(target=follow, name="workspace", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with suppress(StorageError, FileNotFoundError):  # an error that ends the block must be the one to show
                self._upload(store)

    def _list(self) -> tuple[str | None, set[str], dict[str, S3Entry]]:
        """Return the index's ETag, the names of the folder's files, and all objects that can be files of it."""
        index = self._store.get(INDEX)
        entries = {name: entry for name, entry in self._store.listed().items() if self._is_finished(name)}
        etag, listed = (index.etag, _listed(self._store.url, index.body)) if index else (None, entries)
        check_keys(self._store.url, listed)
        return etag, set(listed), entries

    def _write(self, store: S3Prefix, files: Mapping[str, _Stamp]) -> bool:
        """Write changed files and the index; return False if another process has written the index."""
        # From the first index on, objects that it does not name are no part of the folder.
        if self._etag is None and not self._write_index(store, self._known):
            return False
        changed = [name for name, stamp in files.items() if self._known.get(name) != stamp]
        self._strays.update(changed)
        with ThreadPoolExecutor(s3.REQUESTS) as pool:
            list(pool.map(lambda name: store.upload(name, self.path / name), changed))
        if not self._write_index(store, files):
            return False
        self._strays.update(self._known)
        self._known = dict(files)
        for name in sorted(self._strays - files.keys()):
            store.delete(name)
        self._strays.clear()
        return True

    def _write_index(self, store: S3Prefix, names: Iterable[str]) -> bool:
        body = json.dumps({"files": sorted(names), "writer": self._writer}, indent=1).encode()
        etag = store.put(INDEX, body, self._etag)
        self._etag = etag or self._etag
        return etag is not None

    def _is_finished(self, name: str) -> bool:
        return not any(_UNFINISHED.match(part) or part in self._excluded for part in name.split("/"))

    def _finished_files(self) -> dict[str, _Stamp]:
        found = {}
        for place, folders, names in os.walk(self.path):
            folders[:] = filter(self._is_finished, folders)
            for file in (Path(place, name) for name in names if self._is_finished(name)):
                with suppress(FileNotFoundError):  # it was deleted meanwhile
                    state = file.stat()
                    found[file.relative_to(self.path).as_posix()] = state.st_size, state.st_mtime_ns, state.st_ino
        return found


def _listed(url: str, index: bytes) -> list[str]:
    """Return the names in an index. Raises StorageError if it is damaged."""
    try:
        listed = json.loads(index)["files"]
        if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
            return listed
    except (ValueError, LookupError, TypeError):
        pass
    raise StorageError(f"{url}/{INDEX} must list the names of files, but is damaged; put it back, or delete it")


def is_remote(place: str) -> bool:
    """Return whether a place is in S3; otherwise it is a local folder."""
    return place.startswith(s3.SCHEME)


def problem(place: str) -> str | None:
    """Return what is wrong with the name of a place; None if it is valid."""
    scheme, rest, _ = place.partition("://")
    if rest and not is_remote(place):
        return f"must be a folder or s3://bucket/prefix, got one that begins with {scheme}://; change it"
    try:
        if is_remote(place):
            s3.parse(place.rstrip("/"))
    except StorageError as error:
        return str(error)
    return None


def absolute(place: str) -> str:
    """Return the path or URL of a place as every process can use it."""
    return place.rstrip("/") if is_remote(place) else str(Path(place).expanduser().absolute())


def uri(place: str) -> str:
    """Return the URI of a place."""
    return absolute(place) if is_remote(place) else Path(absolute(place)).as_uri()


@contextmanager
def opened(place: str, excluded: Collection[str] = (), within: Path | None = None) -> Iterator[LocalWorkspace]:
    """Open the folder at a place; a folder in S3 is copied for the time of the block.

    Args:
        place: a path, or `s3://bucket/prefix`.
        excluded: names of folders that are no part of it.
        within: parent folder of the copy; `WORK` by default.
    Raises:
        StorageError: S3 cannot be read.
    """
    if not is_remote(place):
        yield LocalWorkspace(Path(place))
        return
    with s3.opened(place) as store, temporary_folder(within) as work:
        path = work / store.url.rpartition("/")[2]  # a training may use the name of its folder
        path.mkdir()
        workspace = S3Workspace(store, path, excluded)
        workspace.download()
        yield workspace


def read(place: str, name: str) -> str | None:
    """Read one text file of a place; return None if it does not exist.

    Raises:
        StorageError: S3 cannot be read.
    """
    if is_remote(place):
        with s3.opened(place, patience=0) as store:
            found = store.get(name)
        return found and found.body.decode()
    try:
        return Path(place, name).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def temporary_folder(root: Path | None = None) -> Iterator[Path]:
    """Create an empty folder in `root`, or in `WORK`, for the block; delete those of dead processes."""
    root = root or Path(WORK).expanduser()
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

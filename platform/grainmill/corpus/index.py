"""Index: the embeddings of a corpus in a folder of Parquet files, with a record of the model and the source.

The files `part-000000.parquet` and on have the columns `id`, `embedding` (fixed-size list of float32), `class` and
`score`. Their metadata contain the record, as does `index.json`. One process at a time writes.
"""

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from grainmill.corpus.embedder import ModelIdentity
from grainmill.corpus.nearest import Block
from grainmill.errors import BusyError, CorpusError
from grainmill.storage import files

RECORD, SKIPPED = "index.json", "skipped.csv"
KEY = b"grainmill"
"""Key of the record in a file's metadata."""
GROUP = 2048
"""Rows of a row group, the unit of reading."""


class IndexRecord(NamedTuple):
    """Model and source of an index."""

    model: ModelIdentity
    source: str
    """Folder, manifest or S3 prefix of the images."""

    def text(self) -> str:
        """Record as JSON."""
        return json.dumps({**self.model._asdict(), "source": self.source}, indent=1)

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """Parse `text`. Raises ValueError, KeyError or TypeError if it is not a record."""
        fields = json.loads(text)
        return cls(ModelIdentity(**{name: fields[name] for name in ModelIdentity._fields}), str(fields["source"]))


class Index:
    """An existing index."""

    def __init__(self, folder: Path) -> None:
        """Raises CorpusError if there is no index, or if a file is damaged or of another model."""
        self.folder = folder
        try:
            self.record = IndexRecord.read((folder / RECORD).read_text())
        except (OSError, ValueError, KeyError, TypeError) as error:
            rule = f"an index must be a folder that `grainmill embed` made, but {folder.absolute()} is none"
            raise CorpusError(f"{rule} ({error}); name another") from error
        self._groups: list[tuple[Path, int, int]] = []  # file, row group, rows
        for path in parts(folder):
            with _readable(path):
                found = pq.read_metadata(path)
                made = IndexRecord.read(found.metadata[KEY])
            if made != self.record:
                rule = f"all files of an index must be of one model, but {path} is of {made.model.model}"
                raise CorpusError(f"{rule} and {RECORD} of {self.record.model.model}; delete the file and embed again")
            self._groups += [(path, group, found.row_group(group).num_rows) for group in range(found.num_row_groups)]

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self._groups)

    def ids(self) -> Iterator[str]:
        """Names of the images, in the order of the rows."""
        for path in dict.fromkeys(path for path, _, _ in self._groups):
            with _readable(path):
                yield from pq.read_table(path, columns=["id"])["id"].to_pylist()

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Positions and embeddings of row groups, from the group with row `start` on."""
        first = 0
        for path, group, rows in self._groups:
            if first + rows > start:
                with _readable(path), pq.ParquetFile(path) as file:
                    column = file.read_row_group(group, columns=["embedding"])["embedding"].combine_chunks()
                yield first, column.flatten().to_numpy().reshape(rows, self.record.model.dimension)
            first += rows


def parts(folder: Path) -> list[Path]:
    """Parquet files of an index."""
    return sorted(folder.glob("part-*.parquet"))


def schema(record: IndexRecord) -> pa.Schema:
    """Schema of the Parquet files."""
    vector = pa.list_(pa.float32(), record.model.dimension)
    fields = [("id", pa.string()), ("embedding", vector), ("class", pa.string()), ("score", pa.float32())]
    return pa.schema(fields, metadata={KEY: record.text()})


@contextmanager
def open_to_write(folder: Path, record: IndexRecord) -> Iterator[Index]:
    """Open the index of a record, or create it, and lock it against other writers during the block.

    Raises:
        BusyError: another process writes to the index.
        CorpusError: the folder holds something else, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RECORD).exists() and set(os.listdir(folder)) - {".lock", f"{RECORD}.draft"}:
            rule = f"an index needs a folder of its own, but {folder.absolute()} holds other files"
            raise CorpusError(f"{rule}; name another with --out")
        lock = (folder / ".lock").open("w")
    except OSError as error:
        rule = f"an index needs a folder to write in, but {folder.absolute()} is none ({error.strerror})"
        raise CorpusError(f"{rule}; name another with --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = f"one process at a time writes an index, but another writes {folder.absolute()}"
            raise BusyError(f"{rule}; wait for it, or name another with --out") from None
        if not (folder / RECORD).exists():
            files.write_text(folder / RECORD, record.text())
        index = Index(folder)
        check_model(index, record.model)
        if index.record.source != record.source:
            rule = f"an index is of one source, but {folder.absolute()} is of {index.record.source}"
            raise CorpusError(f"{rule}, got {record.source}; name another with --out")
        yield index


def check_model(index: Index, model: ModelIdentity) -> None:
    """Raise CorpusError if embeddings of a model cannot be compared with those of an index."""
    made = index.record.model
    if (made.digest, made.dimension) != (model.digest, model.dimension):
        rule = f"an index can only be used with the model that made it, and {index.folder.absolute()} is of "
        found = f"{made.model} ({made.dimension} dimensions, digest {made.digest[:12]}), got "
        other = f"{model.model} ({model.dimension} dimensions, digest {model.digest[:12]})"
        raise CorpusError(f"{rule}{found}{other}; name {made.model}, or embed the images again with --out ANOTHER")


def write_part(folder: Path, table: pa.Table) -> None:
    """Add a file of rows atomically; the caller has opened the index to write."""
    last = max((int(path.stem.removeprefix("part-")) for path in parts(folder)), default=-1)
    with files.atomic(folder / f"part-{last + 1:06d}.parquet") as draft:
        pq.write_table(table, draft, row_group_size=GROUP, compression="zstd", use_dictionary=["class"])


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    files.write_text(path, text.getvalue())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        rule = f"every file of an index must be whole, but {path} is not ({error})"
        raise CorpusError(f"{rule}; delete it, and the same `grainmill embed` makes it again") from error

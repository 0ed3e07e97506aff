"""Index: the embeddings of a corpus in a folder of Parquet files, with a record of the model and the source.

The files `part-000000.parquet` and on have the columns `id`, `embedding` (fixed-size list of float32), `class`,
`score`, and of the image file `size`, `version` (time of modification or ETag) and `digest` (SHA-256). Their metadata
contain the model and the source, as does `.record.json`, which also has the SHA-256 of each file. Readers of Parquet
datasets skip hidden files, so that they can read the folder; lists and pages are in a folder beside it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from grainmill.corpus.embedder import ModelIdentity
from grainmill.corpus.nearest import Block
from grainmill.errors import CorpusError
from grainmill.storage import files

RECORD, OLD_RECORD = ".record.json", "index.json"
KEY = b"grainmill"
"""Key of model and source in a file's metadata."""


class IndexRecord(NamedTuple):
    """Model and images of an index, and the files that belong to it."""

    model: ModelIdentity
    source: str
    """Folder, manifest or S3 prefix of the images, as `source.canonical` writes it."""
    parts: dict[str, str]
    """SHA-256 of each Parquet file, by name."""
    listing: str | None
    """`source.Corpus.digest` when all images had been embedded; None before."""

    @property
    def identity(self) -> str:
        """Model and source as JSON, for the metadata of the files."""
        return json.dumps({**self.model._asdict(), "source": self.source})

    def write(self, folder: Path) -> None:
        """Write the record atomically, with a digest that shows later changes."""
        fields = {**json.loads(self.identity), "parts": self.parts, "listing": self.listing}
        fields["sha256"] = _digest(fields)
        files.write_text(folder / RECORD, json.dumps(fields, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the record of an index. Raises OSError, ValueError, KeyError or TypeError if it is not one."""
        fields = json.loads((folder / RECORD).read_text())
        if fields.pop("sha256") != _digest(fields):
            raise ValueError(f"{RECORD} was changed")
        model = ModelIdentity(**{name: fields[name] for name in ModelIdentity._fields})
        return cls(model, fields["source"], fields["parts"], fields["listing"])


def _digest(fields: dict[str, Any]) -> str:
    return files.digest(json.dumps(fields, sort_keys=True).encode())


class Index:
    """An existing index."""

    def __init__(self, folder: Path) -> None:
        """Raises CorpusError if there is no index, or if files are missing, altered or of another index."""
        self.folder = folder
        check_age(folder)
        try:
            self.record = IndexRecord.read(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            rule = f"an index must be a folder as `grainmill embed` wrote it, but {folder.absolute()} is none"
            raise CorpusError(f"{rule} ({error}); name another, or embed again") from error
        if damaged := [f"{folder / name} {reason}" for name, reason in faults(folder, self.record).items()]:
            rule = "every file of an index must be as `grainmill embed` wrote it, but "
            raise CorpusError(f"{rule}{'; '.join(damaged)}; the same `grainmill embed` repairs it")
        self._groups: list[tuple[Path, int, int]] = []  # file, row group, rows
        for path in parts(folder):
            found = pq.read_metadata(path)
            self._groups += [(path, group, found.row_group(group).num_rows) for group in range(found.num_row_groups)]

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self._groups)

    def column(self, name: str) -> Iterator[Any]:
        """Values of a column, in the order of the rows."""
        for path in dict.fromkeys(path for path, _, _ in self._groups):
            with _readable(path):
                yield from pq.read_table(path, columns=[name])[name].to_pylist()

    def versions(self) -> dict[str, tuple[int, str]]:
        """Size and version of each image file when it was embedded, by name."""
        return dict(zip(self.column("id"), zip(self.column("size"), self.column("version"), strict=True), strict=True))

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


def reports(folder: Path) -> Path:
    """Folder of the lists and pages about an index."""
    return folder.absolute().with_name(f"{folder.absolute().name}.reports")


def schema(record: IndexRecord) -> pa.Schema:
    """Schema of the Parquet files."""
    vector = pa.list_(pa.float32(), record.model.dimension)
    fields = [("id", pa.string()), ("embedding", vector), ("class", pa.string()), ("score", pa.float32())]
    fields += [("size", pa.int64()), ("version", pa.string()), ("digest", pa.string())]
    return pa.schema(fields, metadata={KEY: record.identity})


def faults(folder: Path, record: IndexRecord) -> dict[str, str]:
    """Names of the Parquet files that are not as the record has them, with the reason."""
    found = {path.name for path in parts(folder)}
    reasons = {name: _fault(folder / name, record.parts.get(name)) for name in sorted(found | record.parts.keys())}
    return {name: reason for name, reason in reasons.items() if reason}


def _fault(path: Path, digest: str | None) -> str | None:
    if digest is None:
        return "is not of this index"
    try:
        if not path.is_file():
            return "is missing"
        return None if files.file_digest(path) == digest else "is cut short or altered"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def check_age(folder: Path) -> None:
    """Raise CorpusError if a folder is an index of an earlier version of Grainmill, without digests."""
    if (folder / OLD_RECORD).exists() and not (folder / RECORD).exists():
        rule = f"an index must have sizes and digests of its images, but {folder.absolute()} is of an earlier version"
        raise CorpusError(f"{rule}; delete it, and embed again")


def check_model(folder: Path, made: ModelIdentity, model: ModelIdentity) -> None:
    """Raise CorpusError if embeddings of a model cannot be compared with those of an index made by another."""
    if (made.digest, made.dimension) != (model.digest, model.dimension):
        rule = f"an index can only be used with the model that made it, and {folder.absolute()} is of "
        found = f"{made.model} ({made.dimension} dimensions, digest {made.digest[:12]}), got "
        other = f"{model.model} ({model.dimension} dimensions, digest {model.digest[:12]})"
        raise CorpusError(f"{rule}{found}{other}; name {made.model}, or embed the images again with --out ANOTHER")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        rule = f"every file of an index must stay as it is while it is read, but {path} does not ({error})"
        raise CorpusError(f"{rule}; try again when nobody writes there") from error

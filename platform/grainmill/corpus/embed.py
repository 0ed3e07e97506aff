"""embed(): computes the embeddings of a corpus with Ray Data and a registered model, and adds them to an index."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.data

from grainmill import trainable
from grainmill.cluster import hardware
from grainmill.cluster.session import connect
from grainmill.corpus import index, index_writer
from grainmill.corpus.embedder import Embedder, ModelIdentity
from grainmill.corpus.lists import write_csv
from grainmill.corpus.source import canonical, list_corpus
from grainmill.errors import CorpusError, ResourceError
from grainmill.storage import files

SKIPPED = "skipped.csv"
BLOCK = 256
"""Images of a worker's task; it reads at most this number ahead."""
BATCH = 64
"""Images of one call of the model."""
READERS = 16
"""Threads of a worker that read images; those that read from S3 mostly wait."""
PART_ROWS, PART_SECONDS = 8192, 5.0
"""Rows, or seconds since the last file, after which a file is written; a crash costs at most that."""


class EmbedResult(NamedTuple):
    """Content of the index after an embedding, and its speed."""

    images: int
    """Number of images in the index."""
    before: int
    """Number of images that the index had before, and has still."""
    skipped: Path | None
    """CSV file with the files that are no usable images and the reasons; None if there are none."""
    faults: int
    """Number of files in that list."""
    seconds: float
    """Time from the first answer to the last, without the start of Ray and of the model."""
    steady: int
    """Number of images that were embedded in that time."""

    @property
    def rate(self) -> float | None:
        """Images a second; None if too few were embedded, or in too short a time, for a measurement."""
        return self.steady / self.seconds if self.steady >= BLOCK and self.seconds >= 2 else None


def embed(
    tracking_uri: str,
    model: str,
    source: str,
    out: Path,
    workers: int,
    address: str | None,
    progress: trainable.Progress,
) -> EmbedResult:
    """Bring an index up to date: embed new and changed images, and drop those that are gone.

    A file has changed if its size or time of modification has, an object in S3 if its size or ETag has. Files that were
    no usable images are tried again. See `grainmill.api.embed` for arguments and errors.
    """
    identity, source = Embedder(tracking_uri, model).identity, canonical(source)
    corpus = list_corpus(identity.trainable, source)
    names = [name for name in corpus.listing.names if _escaped(name) == name]
    unnamed = {_escaped(name): "has a name that is not text" for name in corpus.listing.names if _escaped(name) != name}
    with index_writer.opened(out, index.IndexRecord(identity, source, {}, None)) as made:
        known = made.keep(corpus.versions)
        missing = [name for name in names if name not in known]
        buffer = _Buffer(made, corpus.versions)
        if missing:
            with connect(address):
                answers = _answers(corpus.images, missing, tracking_uri, identity, workers)
                for table in progress(answers, "embedding", -(-len(missing) // BLOCK)):
                    buffer.add(table)
        buffer.flush()
        faults = unnamed | buffer.faults
        if not known and not buffer.written:
            name, reason = next(iter(faults.items()))
            listed = len(corpus.listing.names)
            raise CorpusError(f"one image at least must be usable, but of {listed} none is: {name} {reason}")
        made.finish(corpus.digest)
        faults |= {_escaped(name): reason for name, reason in corpus.listing.left_out.items()}
        skipped = index.reports(out) / SKIPPED
        if faults:
            write_csv(skipped, ("id", "reason"), sorted(faults.items()))
        else:
            skipped.unlink(missing_ok=True)
        total, place = len(known) + buffer.written, skipped if faults else None
        return EmbedResult(total, len(known), place, len(faults), buffer.seconds, buffer.steady)


def _escaped(name: str) -> str:
    """Return a name with escapes for bytes that are not UTF-8; the same name if there are none."""
    return name.encode(errors="backslashreplace").decode()


class _Worker:
    """Reads and embeds images: maps a table of names to a table of answers."""

    def __init__(self, images: trainable.Images, tracking_uri: str, identity: ModelIdentity) -> None:
        hardware.check_gpu()
        self.images, self.dimension = images, identity.dimension
        self.embedder = Embedder(tracking_uri, identity.model)

    def __call__(self, batch: pa.Table) -> pa.Table:
        answers: list[tuple[Any, ...]] = []
        with ThreadPoolExecutor(READERS) as threads:
            contents = threads.map(self._read, batch["id"].to_pylist())  # goes on while the model computes
            while some := list(islice(contents, BATCH)):
                for content, one in zip(some, self.embedder(some), strict=True):
                    digest = files.digest(content) if isinstance(content, bytes) else None
                    answers.append((one.embedding, one.class_name, one.score, digest, one.error))
        columns = zip(*answers, strict=True)
        kinds = (pa.list_(pa.float32(), self.dimension), pa.string(), pa.float32(), pa.string(), pa.string())
        arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        return pa.table([batch["id"], *arrays], ["id", "embedding", "class", "score", "digest", "error"])

    def _read(self, name: str) -> bytes | str:
        """Content of an image, or the reason why it cannot be read."""
        try:
            return self.images.read(name)
        except ValueError as error:
            return str(error)


def _answers(
    images: trainable.Images, names: Sequence[str], tracking_uri: str, identity: ModelIdentity, workers: int
) -> Iterator[pa.Table]:
    """Embed images on the connected Ray cluster; yields the workers' tables of `BLOCK` answers as they come."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = [pa.table({"id": names[start : start + BLOCK]}) for start in range(0, len(names), BLOCK)]
    data = ray.data.from_arrow(blocks).map_batches(
        _Worker,
        batch_size=BLOCK,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks))),
        fn_constructor_args=(images, tracking_uri, identity),
        **_share(workers),
    )
    try:
        # Fetching one ahead would hold each table back until the next is there.
        yield from data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        rule = "every worker must load the model and answer, but one did not"
        raise CorpusError(f"{rule} ({reason}); the same command carries on") from error


def _share(workers: int) -> dict[str, float]:
    """CPUs and GPUs of each worker. Raises ResourceError if there are not enough."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if sum(cores) < workers:
        rule = f"{workers} workers need {workers} CPU (one each), but the cluster has {sum(cores)}"
        raise ResourceError(f"{rule}; lower --workers")
    cards = sum(node.get("GPU", 0) for node in nodes)
    return {"num_cpus": max(1, min(sum(cores) // workers, *cores)), "num_gpus": 1 if cards >= workers else 0}


class _Buffer:
    """Collects answers, and adds them to an index in large files."""

    def __init__(self, made: index_writer.IndexWriter, versions: Mapping[str, tuple[int, str]]) -> None:
        self.made, self.versions = made, versions
        self.schema = index.schema(made.record)
        self.written, self.steady, self.seconds = 0, 0, 0.0
        self.faults: dict[str, str] = {}
        self._waiting: list[pa.Table] = []
        self._first = self._last = 0.0
        """Times of the first table and of the last written file."""

    def add(self, table: pa.Table) -> None:
        now = time.monotonic()
        if self._first:
            self.steady, self.seconds = self.steady + len(table), now - self._first
        else:
            self._first = self._last = now
        faults = table.filter(table["error"].is_valid()).select(["id", "error"]).to_pydict()
        self.faults |= dict(zip(*faults.values(), strict=True))
        self._waiting.append(self._rows(table.filter(table["error"].is_null())))
        if sum(map(len, self._waiting)) >= PART_ROWS or now - self._last >= PART_SECONDS:
            self.flush()
            self._last = now

    def _rows(self, table: pa.Table) -> pa.Table:
        """Add the size and version that the images had in the listing: a later change is found the next time."""
        found = [self.versions[name] for name in table["id"].to_pylist()]
        table = table.append_column("size", pa.array([size for size, _ in found], pa.int64()))
        table = table.append_column("version", pa.array([version for _, version in found], pa.string()))
        return table.select(self.schema.names).cast(self.schema)

    def flush(self) -> None:
        """Write the collected rows to a file."""
        rows = pa.concat_tables(self._waiting or [self.schema.empty_table()])
        if len(rows):
            self.made.add(rows.combine_chunks())
            self.written += len(rows)
        self._waiting = []

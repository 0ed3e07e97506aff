"""embed(): computes the embeddings of a corpus with Ray Data and a registered model, and adds them to an index."""

import logging
import time
from collections.abc import Iterator, Sequence
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
from grainmill.corpus import index
from grainmill.corpus.embedder import Embedder, ModelIdentity
from grainmill.errors import CorpusError, ResourceError
from grainmill.storage.mirror import S3Files

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
    """Number of images that the index had before."""
    skipped: Path | None
    """CSV file with the files that are no usable images and the reasons; None if there are none."""
    faults: int
    """Number of files in that list."""
    seconds: float
    """Time from the first answer to the last, without the start of Ray and of the model."""
    steady: int
    """Number of images that were embedded in that time."""


def embed(
    tracking_uri: str,
    model: str,
    source: str,
    out: Path,
    workers: int,
    address: str | None,
    progress: trainable.Progress,
) -> EmbedResult:
    """Embed the images that the index lacks; files that were no usable images are tried again.

    Images are identified by their names. A changed file with the same name is not embedded again.
    See `grainmill.api.embed` for arguments and errors.
    """
    identity = Embedder(tracking_uri, model).identity
    images, listing = _list_images(identity, source)
    names = listing.names
    with index.open_to_write(out, index.IndexRecord(identity, source)) as made:
        known = set(made.ids())
        missing = [name for name in names if name not in known]
        unnamed = [name for name in missing if name.encode(errors="ignore").decode() != name]
        faults = dict.fromkeys(unnamed, "has a name that is not text")
        missing = [name for name in missing if name not in faults]
        writer = _Writer(out, made.record)
        if missing:
            with connect(address):
                answers = _answers(images, missing, tracking_uri, identity, workers)
                for table in progress(answers, "embedding", -(-len(missing) // BLOCK)):
                    writer.add(table)
        writer.flush()
        faults |= writer.faults
        left_out = {name.encode(errors="backslashreplace").decode(): why for name, why in listing.left_out.items()}
        if not known and not writer.written:
            name, reason = next(iter(faults.items()))
            raise CorpusError(f"one image at least must be usable, but of {len(names)} none is: {name} {reason}")
        skipped = out / index.SKIPPED
        faults |= left_out
        if faults:
            index.write_csv(skipped, ("id", "reason"), sorted(faults.items()))
        else:
            skipped.unlink(missing_ok=True)
        listed = skipped if faults else None
        total = len(known) + writer.written
        return EmbedResult(total, len(known), listed, len(faults), writer.seconds, writer.steady)


def _list_images(identity: ModelIdentity, source: str) -> tuple[trainable.Images, trainable.Listing]:
    """List the images of a source; returns them and the list. Raises CorpusError if there are none."""
    try:
        images = trainable.find(identity.trainable).images(source, S3Files())
        listing = images.listing()
    except ValueError as error:
        raise CorpusError(str(error)) from error
    if not listing.names:
        beside = [f"{name}, which {reason}" for name, reason in listing.left_out.items()]
        found = f"none were found there, only {beside[0]}" if beside else "none were found there"
        raise CorpusError(f"{source} must hold images, but {found}; name another folder or prefix")
    return images, listing


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
                answers += [(one.embedding, one.class_name, one.score, one.error) for one in self.embedder(some)]
        columns = zip(*answers, strict=True)
        kinds = (pa.list_(pa.float32(), self.dimension), pa.string(), pa.float32(), pa.string())
        arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        return pa.table([batch["id"], *arrays], ["id", "embedding", "class", "score", "error"])

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


class _Writer:
    """Collects answers, and writes them to files of the index."""

    def __init__(self, folder: Path, record: index.IndexRecord) -> None:
        self.folder, self.schema = folder, index.schema(record)
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
        self._waiting.append(table.filter(table["error"].is_null()).select(self.schema.names))
        if sum(map(len, self._waiting)) >= PART_ROWS or now - self._last >= PART_SECONDS:
            self.flush()
            self._last = now

    def flush(self) -> None:
        """Write the collected rows to a file."""
        rows = pa.concat_tables(self._waiting or [self.schema.empty_table()])
        if len(rows):
            index.write_part(self.folder, rows.combine_chunks().cast(self.schema))
            self.written += len(rows)
        self._waiting = []

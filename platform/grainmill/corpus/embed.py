"""embed(): the images of a corpus through a registered model, by Ray Data, into an index."""

import csv
import io
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
from grainmill.cluster.session import connect
from grainmill.corpus import index
from grainmill.corpus.embedder import Embedder, ModelIdentity
from grainmill.errors import CorpusError, ResourceError
from grainmill.storage import files
from grainmill.storage.mirror import S3Files

BLOCK = 256
"""Images that a worker is given at once, and reads ahead at most."""
BATCH = 64
"""Images that the model is given at once."""
READERS = 16
"""Threads of a worker that read: those of a bucket wait most of the time."""
PART_ROWS, PART_SECONDS = 8192, 5.0
"""When a file is written; what a crash costs is less."""


class EmbedResult(NamedTuple):
    """What came of it."""

    images: int
    """In the index now."""
    before: int
    """Of these, that were there already."""
    skipped: Path | None
    """Lists the images that are none, with the reasons; None if there are none of that kind."""
    faults: int
    """How many these are."""
    seconds: float
    """From the first answer to the last, without the start of Ray and of the model."""
    steady: int
    """Images that were answered in that time."""


def embed(
    tracking_uri: str,
    model: str,
    source: str,
    out: Path,
    workers: int,
    address: str | None,
    progress: trainable.Progress,
) -> EmbedResult:
    """Embed the images of a corpus that are not in the index yet; those that are none are tried again.

    An image is known by its name: whether its content has changed is not looked at.

    Args:
        tracking_uri: MLflow's. Workers fetch the model from there.
        model: `models:/name@alias` or `models:/name/version`.
        source: of images, as the model's trainable understands it.
        out: folder of the index. Only this process writes there.
        workers: that each hold the model.
        address: of a Ray cluster; None starts a local one for the time of the call.
        progress: shows the progress.
    Raises:
        BusyError, CorpusError: the images, the index or the model cannot be used.
        ResourceError: the cluster is too small.
        TrackingError: the model is not registered, or MLflow does not answer.
    """
    identity = Embedder(tracking_uri, model).identity
    images, names = listed(identity, source)
    with index.open_to_write(out, index.IndexRecord(identity, source)) as made:
        known = set(made.ids())
        missing = [name for name in names if name not in known]
        faults = dict.fromkeys((name for name in missing if not _is_text(name)), "has a name that is not text")
        missing = [name for name in missing if name not in faults]
        writer = _Writer(out, made.record)
        if missing:
            with connect(address):
                answers = _answers(images, missing, tracking_uri, identity, workers)
                count = -(-len(missing) // BLOCK)
                for table in progress(answers, "embedding", count):
                    writer.add(table)
        writer.close()
        faults |= writer.faults
        if not known and not writer.written:
            name, reason = next(iter(faults.items()))
            raise CorpusError(f"one image at least must be usable, but of {len(names)} none is: {name} {reason}")
        listing = _list_faults(out / index.SKIPPED, faults)
        total = len(known) + writer.written
        return EmbedResult(total, len(known), listing, len(faults), writer.seconds, writer.steady)


def listed(identity: ModelIdentity, source: str) -> tuple[trainable.Images, Sequence[str]]:
    """The images of a source, and their names, one at least."""
    try:
        images = trainable.find(identity.trainable).images(source, S3Files())
        names = images.names()
    except ValueError as error:
        raise CorpusError(str(error)) from error
    if not names:
        raise CorpusError(f"{source} must hold images, but none were found there; name another folder or prefix")
    return images, names


def _is_text(name: str) -> bool:
    """Whether a name can be written down; names of files are bytes, not always text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Worker:
    """Reads images, calls the model; one table of answers for each table of names."""

    def __init__(self, images: trainable.Images, tracking_uri: str, identity: ModelIdentity) -> None:
        self.images, self.dimension = images, identity.dimension
        self.embedder = Embedder(tracking_uri, identity.model)

    def __call__(self, batch: pa.Table) -> pa.Table:
        answers: list[tuple[Any, ...]] = []
        with ThreadPoolExecutor(READERS) as threads:
            contents = threads.map(self._read, batch["id"].to_pylist())  # goes on while the model computes
            while some := list(islice(contents, BATCH)):
                answers += self._answers(some)
        columns = zip(*answers, strict=True)
        kinds = (pa.list_(pa.float32(), self.dimension), pa.string(), pa.float32(), pa.string())
        arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        return pa.table([batch["id"], *arrays], ["id", "embedding", "class", "score", "error"])

    def _read(self, name: str) -> bytes | ValueError:
        try:
            return self.images.read(name)
        except ValueError as error:
            return error

    def _answers(self, contents: Sequence[bytes | ValueError]) -> Iterator[tuple[Any, ...]]:
        """Embedding, class, score and error of each."""
        answers = iter(self.embedder([one for one in contents if isinstance(one, bytes)]))
        for one in contents:
            if isinstance(one, bytes):
                answer = next(answers)
                yield answer.embedding, answer.class_name, answer.score, answer.error
            else:
                yield None, None, None, str(one)


def _answers(
    images: trainable.Images, names: Sequence[str], tracking_uri: str, identity: ModelIdentity, workers: int
) -> Iterator[pa.Table]:
    """Tables of a block of images each, as they come, from workers on the Ray that is there."""
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
        told = str(error).strip().splitlines()[-1]
        rule = "every worker must load the model and answer, but one did not"
        raise CorpusError(f"{rule} ({told}); the same command carries on") from error


def _share(workers: int) -> dict[str, float]:
    """CPUs and GPUs of each worker.

    Raises:
        ResourceError: there are not enough.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if sum(cores) < workers:
        rule = f"{workers} workers need {workers} CPU (one each), but the cluster has {sum(cores)}"
        raise ResourceError(f"{rule}; lower --workers")
    cards = sum(node.get("GPU", 0) for node in nodes)
    return {"num_cpus": max(1, min(sum(cores) // workers, *cores)), "num_gpus": 1 if cards >= workers else 0}


class _Writer:
    """Answers on their way into files."""

    def __init__(self, folder: Path, record: index.IndexRecord) -> None:
        self.folder, self.schema = folder, index.schema(record)
        self.written, self.steady, self.seconds = 0, 0, 0.0
        self.faults: dict[str, str] = {}
        self._waiting: list[pa.Table] = []
        self._first = self._last = 0.0
        """When the first table came, and when a file was written last."""

    def add(self, table: pa.Table) -> None:
        now = time.monotonic()
        if self._first:
            self.steady, self.seconds = self.steady + len(table), now - self._first
        else:
            self._first = self._last = now
        bad = table["error"].is_valid()
        faults = table.filter(bad).select(["id", "error"]).to_pydict()
        self.faults |= dict(zip(*faults.values(), strict=True))
        self._waiting.append(table.filter(table["error"].is_null()).select(self.schema.names))
        rows = sum(map(len, self._waiting))
        if rows >= PART_ROWS or now - self._last >= PART_SECONDS:
            self.close()
            self._last = now

    def close(self) -> None:
        """Write what waits."""
        rows = pa.concat_tables(self._waiting or [self.schema.empty_table()])
        if len(rows):
            index.write_part(self.folder, rows.combine_chunks().cast(self.schema))
            self.written += len(rows)
        self._waiting = []


def _list_faults(path: Path, faults: Mapping[str, str]) -> Path | None:
    """Write the list of images that are none; without any there is no list."""
    if not faults:
        path.unlink(missing_ok=True)
        return None
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(("id", "reason"))
    for row in sorted(faults.items()):
        write(row)
    files.write_text(path, text.getvalue())
    return path

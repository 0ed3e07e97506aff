"""Which images a training and its metrics were made of: a digest for each part of a data set."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from multigrain.data.dataset import Dataset


class DataPart(NamedTuple):
    """Images with one role."""

    name: str
    role: Literal["training", "evaluation"]
    digest: str
    """The first 32 hexadecimal digits of a SHA-256 over names below `where`, sizes in bytes, and what the images show.

    Contents are not read again: an image that is exchanged for one of equal name and size goes unnoticed.
    """
    rows: int
    where: str
    """Folder above all files of the data set."""


def parts(dataset: Dataset) -> list[DataPart]:
    """The parts of a data set: `train`, `val` and, if there are copies, `copies`.

    Raises:
        OSError: a file is gone.
    """
    where = os.path.commonpath([path.absolute().parent for path in dataset.paths])

    def part(name: str, role: Literal["training", "evaluation"], images: Iterable[tuple[Path, object]]) -> DataPart:
        lines = [f"{path.absolute().relative_to(where)}\0{path.stat().st_size}\0{shows}\n" for path, shows in images]
        content = "".join(lines).encode(errors="surrogateescape")
        return DataPart(name, role, hashlib.sha256(content).hexdigest()[:32], len(lines), where)

    labels = [dataset.classes[label] for label in dataset.train_labels]
    held_out = [dataset.classes[label] for label in dataset.val_labels]
    found = [
        part("train", "training", zip(dataset.train, zip(labels, dataset.instances, strict=True), strict=True)),
        part("val", "evaluation", zip(dataset.val, held_out, strict=True)),
    ]
    if copies := dataset.copies:
        database = ((path, "database") for path in copies.database)
        queries = zip(copies.queries, copies.truth, strict=True)
        found.append(part("copies", "evaluation", (*database, *queries)))
    return found

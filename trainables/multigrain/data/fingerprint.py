"""Fingerprint of a data set: a digest for each of its parts, to tell which images a model was trained and judged on."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from multigrain.data.dataset import Dataset
from multigrain.digests import digest


class DataPart(NamedTuple):
    """Images of a data set that have the same role."""

    name: str
    role: Literal["training", "evaluation"]
    digest: str
    """First 32 hexadecimal digits of the SHA-256 over names below `where`, sizes in bytes, and labels.

    Contents are not read: an image that is replaced by another of equal name and size goes unnoticed.
    """
    rows: int
    where: str
    """Folder above all files of the data set."""


def parts(dataset: Dataset) -> list[DataPart]:
    """Return the parts `train`, `val` and, for a data set with copies, `copies`.

    Raises:
        OSError: a file does not exist any more.
    """
    where = os.path.commonpath([path.absolute().parent for path in dataset.paths])

    def part(name: str, role: Literal["training", "evaluation"], images: Iterable[tuple[Path, object]]) -> DataPart:
        lines = [f"{path.absolute().relative_to(where)}\0{path.stat().st_size}\0{shows}\n" for path, shows in images]
        return DataPart(name, role, digest("".join(lines).encode(errors="surrogateescape"))[:32], len(lines), where)

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

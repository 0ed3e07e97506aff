"""Leaving out broken images, by choice: what is left of a data set, and whether it can still be used."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from multigrain.data.dataset import Copies, Dataset
from multigrain.errors import DataError

MOST = 10
"""At most one image in so many may be left out."""


def leave_out(dataset: Dataset, faults: Mapping[Path, str]) -> tuple[Dataset, dict[Path, str]]:
    """The data set without broken images, and each image that is left out with the reason.

    A query whose original is broken is left out, too, and so is an image whose name no manifest can hold.

    Raises:
        DataError: what is left cannot be used.
    """
    left_out = dict(faults)
    for path in dataset.paths:
        if not _is_utf8(str(path)):
            left_out.setdefault(path, "has a name that is not UTF-8")
    copies = dataset.copies and _intact_copies(dataset.copies, left_out)
    train = [index for index, path in enumerate(dataset.train) if path not in left_out]
    val = [index for index, path in enumerate(dataset.val) if path not in left_out]
    first: dict[int, int] = {}
    intact = replace(
        dataset,
        train=tuple(dataset.train[index] for index in train),
        train_labels=tuple(dataset.train_labels[index] for index in train),
        val=tuple(dataset.val[index] for index in val),
        val_labels=tuple(dataset.val_labels[index] for index in val),
        copies=copies,
        instances=tuple(first.setdefault(dataset.instances[old], new) for new, old in enumerate(train)),
    )
    if problems := _problems(dataset, intact, left_out):
        raise DataError(problems)
    return intact, left_out


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _intact_copies(copies: Copies, left_out: dict[Path, str]) -> Copies | None:
    """What is left of the copies; queries without their original are added to `left_out`."""
    for path, index in zip(copies.queries, copies.truth, strict=True):
        if (original := copies.database[index]) in left_out:
            left_out.setdefault(path, f"is a copy of {original}, which is left out")
    place: dict[int, int] = {}
    for index, path in enumerate(copies.database):
        if path not in left_out:
            place[index] = len(place)
    queries = [number for number, path in enumerate(copies.queries) if path not in left_out]
    if not queries:
        return None
    return Copies(
        tuple(copies.database[index] for index in place),
        tuple(copies.queries[number] for number in queries),
        tuple(place[copies.truth[number]] for number in queries),
    )


def _problems(dataset: Dataset, intact: Dataset, left_out: Mapping[Path, str]) -> list[str]:
    problems = []
    if (count := len(left_out)) * MOST > (total := len(dataset.paths)):
        path, fault = next(iter(left_out.items()))
        problems.append(
            f"at most a tenth of the images may be left out, but {count} of {total} cannot be used, the first of them "
            f"because {path} {fault}; repair or remove them"
        )
    parts: tuple[tuple[str, Sequence[int], Sequence[int]], ...] = (
        ("train", dataset.train_labels, intact.train_labels),
        ("val", dataset.val_labels, intact.val_labels),
    )
    for part, before, after in parts:
        problems += [
            f"every class needs an intact image, but all {before.count(label)} of {dataset.classes[label]!r} in {part} "
            "cannot be used; repair them or remove the class"
            for label in sorted(set(before) - set(after))
        ]
    lost = [name for name in dataset.metrics if name not in intact.metrics]
    if lost:
        problems.append(f"without the images that cannot be used there is no {' and no '.join(lost)}; repair them")
    return problems


def write_intact(manifest: str, skipped: str, root: Path) -> Path:
    """Write `intact-<digest>/manifest.csv` below `root`, and `skipped.txt` beside it; returns the manifest.

    The digest is of the content, so that processes that write at once write the same.
    """
    content = {"skipped.txt": skipped.encode(errors="backslashreplace"), "manifest.csv": manifest.encode()}
    digest = hashlib.sha256(b"\0".join(content.values())).hexdigest()[:12]
    folder = root / f"intact-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        draft = folder / f"{name}.{os.getpid()}"
        draft.write_bytes(data)
        draft.replace(folder / name)
    return folder / "manifest.csv"

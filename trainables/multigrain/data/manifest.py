"""Manifests: CSV files that list images. Reads one as a `Dataset`, or reports everything wrong with it; writes one.

Columns: `image`, a path relative to the manifest's folder, or absolute; `class`; optionally `role`, one of `ROLES`;
optionally `instance_id`. Training images with the same instance_id show the same. The instance_id of a query is that of
its original in the database; database rows without queries are distractors.

An image can be s3://bucket/key; if the manifest itself is in S3, relative paths are objects, too. The optional columns
`size`, in bytes, and `etag` name the version of an object; then S3 is not asked for it.
"""

import csv
import difflib
import io
import os
import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from multigrain.data.dataset import CopySet, Dataset
from multigrain.data.folders import split
from multigrain.data.layout import alike_problems
from multigrain.data.listing import identity
from multigrain.data.tables import read_rows
from multigrain.errors import DataError
from multigrain.hooks import SCHEME, LocalFiles, Mirror, Pin, Progress, data_errors, no_progress

COLUMNS = ("image", "class", "role", "instance_id")
REQUIRED = ("image", "class")
PINS = ("size", "etag")
ROLES = ("train", "val", "database", "query")
OF_CLASSES = ("", "train", "val")
"""Roles whose rows need a class; "" stands for a manifest without roles."""


class Row(NamedTuple):
    """A line of a manifest."""

    line: int
    path: Path
    image: str
    label: str
    role: str
    instance: str
    file: Hashable
    """The same for all rows of one file: see `listing.identity`."""


class ManifestReader:
    """Reads one manifest, and collects everything that is wrong with it."""

    def __init__(self, file: Path, mirror: Mirror | None = None, progress: Progress = no_progress) -> None:
        self.file = file.absolute()
        self.mirror, self.progress = mirror or LocalFiles(), progress
        self.problems: list[str] = []

    def add(self, line: int, problem: str) -> None:
        """Record a problem of a line."""
        self.problems.append(f"{self.file}, line {line}: {problem}")

    def raise_problems(self) -> None:
        """Raise DataError with the problems found so far, if any."""
        if self.problems:
            raise DataError(self.problems)

    def records(self) -> list[tuple[int, list[str]]]:
        """Return the lines that are not blank, the header first, each with its number."""
        return read_rows(self.file, (*COLUMNS, *PINS), "manifest")

    def check_header(self, line: int, header: Sequence[str], required: Sequence[str] = REQUIRED) -> None:
        """Record what is wrong with the names of the columns."""
        for name in dict.fromkeys(header):
            if header.count(name) > 1:
                self.add(line, f"each column may come once, but {name!r} comes {header.count(name)} times")
            if name not in (*COLUMNS, *PINS):
                blanks = f"remove the blanks around {name.strip()!r}" if name.strip() in (*COLUMNS, *PINS) else ""
                self.add(line, f"unknown column {name!r}; {blanks or _hint(name, COLUMNS)}")
        for name in required:
            if name not in header:
                self.add(line, f"the column {name!r} is required, found {', '.join(header)}")

    def has_all_cells(self, line: int, cells: Sequence[str], header: Sequence[str]) -> bool:
        """Return whether a line has a cell for each column; if not, record it."""
        if len(cells) != len(header):
            self.add(line, f"a row must have as many cells as the header, {len(header)}, got {len(cells)}")
        return len(cells) == len(header)

    def rows(self, header: Sequence[str], records: Sequence[tuple[int, list[str]]]) -> list[Row]:
        """Return the rows that are complete enough to be checked together."""
        self._fetch(header, records)
        rows = []
        for line, values in records:
            if not self.has_all_cells(line, values, header):
                continue
            cells = {name: value if value.strip() else "" for name, value in zip(header, values, strict=True)}
            image, label, role = cells["image"], cells["class"], cells.get("role", "")
            if (path := self._path(image)) is None:
                continue
            row = Row(line, path, image, label, role, cells.get("instance_id", ""), identity(path))
            needed = {"image": True, "class": role in OF_CLASSES, "role": "role" in header}
            empty = [name for name in needed if needed[name] and not cells[name]]
            for name in empty:
                self.add(line, f"the cell of {name!r} must not be empty")
            if image and row.file is None:
                self.add(line, f"every image must exist, but there is no file {row.path}")
            if role and role not in ROLES:
                self.add(line, f"unknown role {role!r}; {_hint(role, ROLES)}")
            elif not empty:
                rows.append(row)
        self._check_repeats(rows)
        return rows

    def _path(self, image: str) -> Path | None:
        """Return the local path of an image; None for a URL that `_fetch` has refused."""
        if image.startswith(SCHEME):
            try:
                return self.mirror.path(image)
            except ValueError:
                return None
        path = self.file.parent / image
        return Path(os.path.normpath(path)) if self.mirror.url(path) else path

    def _fetch(self, header: Sequence[str], records: Sequence[tuple[int, list[str]]]) -> None:
        """Read the objects that rows name."""
        wanted: dict[str, Pin | None] = {}
        own = self.mirror.url(self.file)
        bucket = "/".join([*own.split("/")[:3], ""]) if own else None
        for line, values in records:
            cells = dict(zip(header, values, strict=False))
            image = cells.get("image", "")
            url: str | None = image
            if not image.startswith(SCHEME):
                url = self.mirror.url(Path(os.path.normpath(self.file.parent / image))) if image.strip() else None
                if bucket and image.strip() and not os.path.isabs(image) and not (url or "").startswith(bucket):
                    self.add(line, f"a relative path in S3 must stay in its bucket, got {image!r}; write an s3:// URL")
                    continue
            if url:
                size, etag = (cells.get(name, "") for name in PINS)
                if bool(size) != bool(etag) or (size and not re.fullmatch("[0-9]{1,15}", size)):
                    self.add(
                        line, f"an object has both a size in bytes and an etag, or none, got {size!r} and {etag!r}"
                    )
                    continue
                try:
                    self.mirror.path(url)
                except ValueError as error:
                    self.add(line, str(error))
                else:
                    wanted[url] = (int(size), etag) if size else None
        with data_errors():
            self.mirror.fetch_objects(wanted, self.progress)

    def _check_repeats(self, rows: Sequence[Row]) -> None:
        first: dict[tuple[str, Hashable], int] = {}
        for row in rows:
            if (line := first.setdefault((row.role, row.file), row.line)) != row.line:
                place = f"role {row.role!r}" if row.role else "manifest"
                self.add(row.line, f"an image may come once in a {place}, but {row.image} is in line {line}, too")

    def split(self, rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
        """Split rows without roles into training and validation."""
        by_class = defaultdict(list)
        for row in rows:
            by_class[row.label].append(row)
        for label, (row, *others) in by_class.items():
            if not others:
                self.add(row.line, f"a class needs 2 images to be split, found 1 of {label!r}; add a column `role`")
        several = {label: found for label, found in by_class.items() if len(found) > 1}
        parts = split(several, share, lambda _, row: Path(row.image).as_posix())
        train, val = (sorted(row for found in part.values() for row in found) for part in parts)
        return train, val

    def check_classes(self, train: Sequence[Row], val: Sequence[Row]) -> None:
        """Record what is wrong between training and validation rows."""
        self.problems += alike_problems((row.label for row in (*train, *val)), self.file)
        known = {row.label for row in train}
        strange: dict[str, int] = {}
        for row in val:
            if row.label not in known and strange.setdefault(row.label, row.line) == row.line:
                self.add(row.line, f"each class of val must have training images, but {row.label!r} has none")
        if len(train) < 2:
            self.problems.append(f"training needs at least 2 images, found {len(train)} in {self.file}")
        if not val:
            self.problems.append(f"validation needs at least 1 image, found none in {self.file}")

    def check_halves(self, train: Sequence[Row], held_out: Sequence[Row]) -> None:
        """Record the held-out images that are trained on, too; without roles, they are repeats in the manifest."""
        trained = {row.file: row.line for row in train if row.role}
        for row in held_out:
            if row.file in trained:
                got = f"{row.image}, of role {row.role!r}, is the image of line {trained[row.file]}, of role 'train'"
                self.add(row.line, f"an image may not be both trained on and held out, but {got}")

    def copies(self, database: Sequence[Row], queries: Sequence[Row]) -> CopySet | None:
        """Match queries with their originals; return None without queries."""
        by_instance = defaultdict(list)
        for row in database:
            by_instance[row.instance].append(row)
        named = dict.fromkeys(row.instance for row in queries if row.instance in by_instance and row.instance)
        for row in queries:
            if row.instance not in named:
                found = f"no row of the database has {row.instance!r}" if row.instance else "the cell is empty"
                self.add(row.line, f"a query must have the instance_id of its original, but {found}")
        for instance in named:
            original, *others = by_instance[instance]
            for row in others:
                self.add(row.line, f"originals must differ in instance_id, but {instance!r} is in line {original.line}")
        if database and not queries:
            self.problems.append(f"a copy-detection set needs queries, but {self.file} has a database only")
        if not queries:
            return None
        originals = [by_instance[instance][0] for instance in named]
        others = [row for row in database if row.instance not in named]
        place = {instance: index for index, instance in enumerate(named)}
        return CopySet(
            tuple(row.path for row in (*originals, *others)),
            tuple(row.path for row in queries),
            tuple(place.get(row.instance, -1) for row in queries),
        )


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def read_manifest(
    file: Path, val_share: float = 0.2, mirror: Mirror | None = None, progress: Progress = no_progress
) -> Dataset:
    """List the images of a manifest in its order.

    Args:
        file: the manifest.
        val_share: share of each class that is held out if there is no column `role`.
        mirror: gives access to images in S3; without it, all images must be local files.
        progress: shows the progress of reading from S3.
    Raises:
        DataError: names everything that is wrong with the manifest.
    """
    reader = ManifestReader(file, mirror, progress)
    (line, header), *records = reader.records()
    reader.check_header(line, header)
    wrong_header = bool(reader.problems)
    if not set(REQUIRED) <= set(header):
        reader.raise_problems()
    rows = reader.rows(header, records)
    if wrong_header:  # rows cannot be checked against each other
        reader.raise_problems()
    train, val, database, queries = ([row for row in rows if row.role == role] for role in ROLES)
    if "role" not in header:
        train, val = reader.split(rows, val_share)
    reader.check_classes(train, val)
    reader.check_halves(train, (*val, *queries))
    copies = reader.copies(database, queries)
    reader.raise_problems()
    classes = tuple(sorted({row.label for row in train}))
    number = {label: index for index, label in enumerate(classes)}
    first: dict[str | int, int] = {}
    return Dataset(
        classes,
        tuple(row.path for row in train),
        tuple(number[row.label] for row in train),
        tuple(row.path for row in val),
        tuple(number[row.label] for row in val),
        copies,
        tuple(first.setdefault(row.instance or index, index) for index, row in enumerate(train)),
    )


def manifest_text(dataset: Dataset, objects: Mapping[Path, tuple[str, Pin]] | None = None) -> str:
    """Return the text of a manifest that `read_manifest` reads as this data set, with absolute paths.

    Args:
        dataset: the images; indices become their instance_id.
        objects: URL and version of the images that are mirrored from S3.
    """
    text = io.StringIO(newline="")
    rows, objects = csv.writer(text), objects or {}
    rows.writerow((*COLUMNS, *PINS) if objects else COLUMNS)

    def write(path: Path, *cells: object) -> None:
        url, pin = objects.get(path, (path.absolute(), ("", "")))
        rows.writerow((url, *cells, *pin) if objects else (url, *cells))

    for path, label, instance in zip(dataset.train, dataset.train_labels, dataset.instances, strict=True):
        write(path, dataset.classes[label], "train", instance)
    for path, label in zip(dataset.val, dataset.val_labels, strict=True):
        write(path, dataset.classes[label], "val", "")
    if copies := dataset.copies:
        originals = set(copies.truth)
        for index, path in enumerate(copies.database):
            write(path, "", "database", index if index in originals else "")
        for path, index in zip(copies.queries, copies.truth, strict=True):
            write(path, "", "query", index)
    return text.getvalue()

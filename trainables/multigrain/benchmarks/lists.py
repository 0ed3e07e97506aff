"""Benchmarks that a list of files describes: DISC21, and a user's own manifest."""

import csv
import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multigrain.benchmarks.base import by_stem, demand, images, indices, noted, pictures
from multigrain.data.manifest import ManifestReader, Row
from multigrain.errors import DataError
from multigrain.evaluation.benchmark import Benchmark
from multigrain.retrieval.metrics import Truth

_HEADERS = (["query", "reference"], ["query_id", "reference_id"])
"""Headers of the ground truth; the authors of the set use the second one."""


def _pairs(file: Path) -> dict[str, set[str]]:
    """Read the references of each query; a distractor has none.

    Raises:
        DataError: rows are wrong; each is named.
    """
    try:
        rows = [*csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline=""), strict=True)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError([f"{file} must be comma-separated values in UTF-8, but is not ({error})"]) from error
    if not rows or rows[0] not in _HEADERS:
        wanted = " or ".join(map(",".join, _HEADERS))
        raise DataError([f"{file} must begin with {wanted}, got {rows[0] if rows else 'nothing'}"])
    pairs: dict[str, set[str]] = {}
    wrong = []
    for number, cells in enumerate(rows[1:], 2):
        if not cells:
            continue
        if len(cells) != len(rows[0]) or not cells[0].strip():
            wrong.append(f"{file}, row {number}: a row must be a query and a reference or nothing, got {cells}")
            continue
        query, reference = (cell.strip() for cell in cells)
        if query in pairs and (not reference or not pairs[query] or reference in pairs[query]):
            wrong.append(f"{file}, row {number}: a query comes again only with another reference, got {cells}")
        pairs.setdefault(query, set()).update({reference} - {""})
    if wrong:
        raise DataError(wrong)
    return pairs


def disc21(root: Path) -> Benchmark:
    """Read DISC21 from the folders `queries/` and `references/` and the authors' ground truth, `groundtruth.csv`.

    The file has the columns `query_id,reference_id` or `query,reference` with names of files without suffix. Every
    query has a row; the second cell is empty for a distractor, which shows no reference. The numbers of images are not
    checked, because they differ between the published parts of the set.

    Raises:
        DataError: queries, references or rows are missing altogether, or rows are wrong.
    """
    file = root / "groundtruth.csv"
    problems: list[str] = []
    queries, references = (images(root / part, problems, deep=True) for part in ("queries", "references"))
    wanted = {"images in queries/": queries, "images in references/": references, file.name: file.is_file()}
    demand("DISC21", root, wanted)
    pairs = _pairs(file)
    by_query, by_reference = by_stem(queries), by_stem(references)
    place = {name: index for index, name in enumerate(by_reference)}
    asked = [name for name in by_query if name in pairs]
    truth = tuple(Truth(indices(place[name] for name in pairs[query] if name in place), indices(())) for query in asked)
    demand("DISC21", root, {"a query whose reference is there": any(len(answer.positives) for answer in truth)})
    named = {name for found in pairs.values() for name in found}
    problems += noted("queries have no row in groundtruth.csv and are left out", sorted(by_query.keys() - pairs.keys()))
    problems += noted("queries of groundtruth.csv are missing", sorted(pairs.keys() - by_query.keys()))
    problems += noted("references of groundtruth.csv are missing", sorted(named - place.keys()))
    shown, measures = pictures(by_query[name] for name in asked), ("micro_ap", "recall@p90", "recall@1")
    return Benchmark("disc21", pictures(references), shown, {"": truth}, measures, problems=tuple(problems))


class _Table(ManifestReader):
    """Reads a manifest in a Parquet file."""

    def add(self, line: int, problem: str) -> None:
        self.problems.append(f"{self.file}, row {line}: {problem}")

    def records(self) -> list[tuple[int, list[str]]]:
        """Return the names of the columns as row 0, then the rows from 1, all values as text."""
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(self.file)
        except Exception as error:  # pyarrow raises many types
            raise DataError([f"the manifest must be a Parquet file, but {self.file} is not ({error})"]) from error
        rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
        cells = (["" if value is None else str(value) for value in row] for row in rows)
        return [(0, table.column_names), *enumerate(cells, 1)]


def _truths(queries: list[Row], database: list[Row], column: str) -> tuple[Truth, ...]:
    """Return for each query the rows with the same value in a column and, as junk, the row of its own file."""
    same: dict[Any, list[int]] = defaultdict(list)
    itself: dict[Any, list[int]] = defaultdict(list)
    for index, row in enumerate(database):
        same[getattr(row, column)].append(index)
        itself[row.file].append(index)
    truths = []
    for row in queries:
        value = getattr(row, column)
        found = {*same.get(value, ())} - {*itself.get(row.file, ())} if value else ()
        truths.append(Truth(indices(found), indices(itself.get(row.file, ()))))
    return tuple(truths)


def manifest(file: Path) -> Benchmark:
    """Read a user's own set: a manifest as for `manifest.read_manifest`, or a `.parquet` file with the same columns.

    Only rows of the roles `database` and `query` are used. In the part `instance`, positives have the query's
    `instance_id`; in the part `class`, they have its class. If only one part has positives, its name is "". Queries
    without positives are distractors. A database row of the query's own file is no item of its list.

    Raises:
        DataError: the manifest is wrong; all reasons are given.
    """
    reader = (_Table if file.suffix.lower() == ".parquet" else ManifestReader)(file)
    (line, header), *records = reader.records()
    reader.check_header(line, header)
    if "role" not in header:
        reader.add(line, "a benchmark needs the column 'role', with database and query")
    reader.raise_problems()
    rows = reader.rows(header, records)
    database, queries = ([row for row in rows if row.role == role] for role in ("database", "query"))
    for role, found in (("database", database), ("query", queries)):
        if not found:
            reader.problems.append(f"a benchmark needs rows of role {role!r}, found none in {file}")
    columns: Mapping[str, str] = {"instance": "instance", "class": "label"}
    truth = {setting: _truths(queries, database, column) for setting, column in columns.items()}
    truth = {setting: truths for setting, truths in truth.items() if any(len(answer.positives) for answer in truths)}
    if database and queries and not truth:
        reader.problems.append(f"a query needs the class or instance_id of a row of the database, found none in {file}")
    reader.raise_problems()
    if len(truth) == 1:
        truth = {"": next(iter(truth.values()))}
    shown, asked = (pictures(row.path for row in part) for part in (database, queries))
    measures = ("map", "map_finite", "map@r", "recall@1", "recall@10", "micro_ap", "recall@p90")
    return Benchmark("manifest", shown, asked, truth, measures)

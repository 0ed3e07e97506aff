"""find() and duplicates(): the nearest images of query images, and pairs of copies, in an index."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from grainmill import trainable
from grainmill.corpus import duplicate_precision, index, nearest
from grainmill.corpus.duplicate_precision import NullModel
from grainmill.corpus.embedder import Embedder
from grainmill.corpus.equal_images import EqualImages
from grainmill.corpus.index import Index
from grainmill.corpus.lists import write_csv
from grainmill.corpus.source import warn_if_older
from grainmill.corpus.thumbnails import Thumbnail, write_page
from grainmill.errors import CorpusError
from grainmill.storage.mirror import S3Files

MOST = 100_000
"""Largest number of pairs in a list of duplicates."""
MOST_BYTES = 2**28
"""Largest size of the file of a query."""
SHOWN = 100
"""Largest number of pairs on the page: the first and the last ones of the list, half each."""


class QueryResult(NamedTuple):
    """Nearest images of one query."""

    query: str
    error: str | None
    """Reason why the query cannot be used; then there are no results."""
    ids: list[str]
    """Names of the images, nearest first."""
    scores: list[float]


class DuplicatesResult(NamedTuple):
    """Groups of equal images, and pairs of others that may be copies of each other."""

    pairs: list[tuple[str, str]]
    """Names of the images, highest score first."""
    scores: list[float]
    precision: list[float | None]
    """Estimated precision of the list down to each pair; None if the corpus is too small for an estimate."""
    more: bool
    """True if pairs above the threshold were left out; they have lower scores than those listed."""
    files: list[Path]
    groups: list[list[str]]
    """Names of the images of each group of equal ones: same bytes, or same embedding. Pairs have the first of each."""

    def __repr__(self) -> str:
        counts = f"{len(self.groups)} groups, {len(self.pairs)} pairs"
        return f"DuplicatesResult({counts}, precision {self.precision[-1:]}, files {self.files})"


def find(
    tracking_uri: str, model: str, folder: Path, queries: Sequence[str], count: int, page: Path
) -> list[QueryResult]:
    """Find the nearest images by exact search. See `grainmill.api.find` for arguments and errors."""
    made = _open(folder)
    embedder = Embedder(tracking_uri, model)
    index.check_model(folder, made.record.model, embedder.identity)
    contents = [_content(Path(query)) for query in queries]
    answers = embedder(contents)
    embeddings = [one.embedding for one in answers if one.embedding is not None]
    if not embeddings:
        lines = [f"{query} {one.error}" for query, one in zip(queries, answers, strict=True)]
        raise CorpusError("a query must be an image, but none is:\n  " + "\n  ".join(lines))
    places, scores = nearest.top_k(np.stack(embeddings), made.blocks(), count)
    names, read = _names(made, places), _reader(made)
    lists = iter(zip(places.tolist(), scores.tolist(), strict=True))
    results, rows = [], []
    for query, answer, content in zip(queries, answers, contents, strict=True):
        if answer.error is not None or isinstance(content, str):
            results.append(QueryResult(query, answer.error, [], []))
            continue
        positions, near = next(lists)
        ids = [names[position] for position in positions]
        results.append(QueryResult(query, None, ids, near))
        found = [Thumbnail(read(name), name, f"{score:.4f}") for name, score in zip(ids, near, strict=True)]
        rows.append([Thumbnail(content, query, "query", query=True), *found])
    summary = f"{len(made):,} images of {made.record.source}, by {made.record.model.model}: nearest first, with scores"
    write_page(page, "Nearest images", summary, rows)
    return results


def duplicates(folder: Path, precision: float, threshold: float | None, out: Path) -> DuplicatesResult:
    """List pairs of images that may be copies. See `grainmill.api.duplicates` for arguments and errors."""
    made = _open(folder)
    equal = EqualImages(made)
    null_model = _fit_null_model(equal)
    if threshold is not None:
        floor = threshold
    elif null_model is not None:
        floor = null_model.score_of((1 - precision) * MOST)  # below, only a longer list has that precision
    else:
        floor = np.inf
        rule = f"an estimate of precision needs more than {duplicate_precision.NEIGHBOURS} different images"
        told = f"{rule}, but {folder.absolute()} has {len(equal.distinct)}; give a --threshold"
        if len(equal.distinct) == len(made):
            raise CorpusError(told)
        warnings.warn(f"only equal images are listed: {told}", stacklevel=2)
    found = nearest.pairs(equal.blocks, floor, MOST)
    listed, estimate = len(found.score), None
    if null_model is not None:
        estimate = duplicate_precision.precision(found.score, null_model)
        if threshold is None:
            listed = int((estimate >= precision).sum())
    first, second = equal.distinct[found.first[:listed]], equal.distinct[found.second[:listed]]
    groups = equal.groups()
    names = _names(made, np.concatenate([first, second, *groups]))
    pairs = [(names[a], names[b]) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    estimates = [None] * listed if estimate is None else estimate[:listed].tolist()
    more = found.more and listed == MOST
    named = [[names[place] for place in group.tolist()] for group in groups]
    result = DuplicatesResult(pairs, found.score[:listed].tolist(), estimates, more, [], named)
    return result._replace(files=_write(result, made, out))


def _open(folder: Path) -> Index:
    """Open an index that has images."""
    made = Index(folder)
    if not len(made):
        raise CorpusError(f"an index must hold images, but {folder.absolute()} has none yet; embed some")
    warn_if_older(made)
    return made


def _fit_null_model(equal: EqualImages) -> NullModel | None:
    """Fit the null model to a sample of the different images; None if there are too few."""
    neighbours, images = duplicate_precision.NEIGHBOURS, len(equal.distinct)
    if images <= neighbours:
        return None
    at = duplicate_precision.sample(images)
    parts = equal.blocks()
    some = np.concatenate([rows[at[(at >= start) & (at < start + len(rows))] - start] for start, rows in parts])
    places, scores = nearest.top_k(some, equal.blocks(), neighbours + 1)
    itself = places == at[:, None]
    itself[~itself.any(axis=1), -1] = True  # many nearly equal images pushed the image itself out of its list
    return duplicate_precision.fit_null_model(scores[~itself].reshape(len(at), neighbours), images)


def _names(made: Index, places: NDArray[np.int64]) -> dict[int, str]:
    """Names of the images at some positions."""
    wanted = set(places.ravel().tolist())
    return {place: name for place, name in enumerate(made.column("id")) if place in wanted}


def _content(path: Path) -> bytes | str:
    """Content of a file, or the reason why it cannot be read."""
    try:
        if path.exists() and not path.is_file():  # to read a pipe would wait for its writer
            return "is no regular file"
        if path.stat().st_size > MOST_BYTES:
            return f"has more than {MOST_BYTES:,} bytes, the most that are read"
        return path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _reader(made: Index) -> Callable[[str], bytes | None]:
    """Return a function that reads an image of the index, or returns None if the image is gone."""
    try:
        images = trainable.find(made.record.model.trainable).images(made.record.source, S3Files())
    except (LookupError, ValueError):
        return lambda _: None

    def read(name: str) -> bytes | None:
        try:
            return images.read(name)
        except ValueError:
            return None

    return read


def _write(found: DuplicatesResult, made: Index, out: Path) -> list[Path]:
    """Write the table and the page."""
    out.mkdir(parents=True, exist_ok=True)
    table, equal, page = out / "duplicates.csv", out / "equal.csv", out / "duplicates.html"
    lines = [
        (*pair, round(score, 6), "" if estimate is None else round(estimate, 4))
        for pair, score, estimate in zip(found.pairs, found.scores, found.precision, strict=True)
    ]
    write_csv(table, ("first", "second", "score", "precision"), lines)
    shown = [*range(len(found.pairs))]
    summary = f"{len(found.pairs):,} pairs of {made.record.source}, highest score first"
    if found.groups:
        summary += f"; {len(found.groups):,} groups of equal images are in {equal.name}"
    if len(shown) > SHOWN:
        shown = shown[: SHOWN // 2] + shown[-SHOWN // 2 :]
        summary += f"; shown are the first and the last {SHOWN // 2}"
    read = _reader(made)
    grouped = [(number, name) for number, group in enumerate(found.groups, 1) for name in group]
    write_csv(equal, ("group", "image"), grouped)
    rows = []
    for number in shown:
        (first, second), estimate = found.pairs[number], found.precision[number]
        note = f"{found.scores[number]:.4f}" + ("" if estimate is None else f", precision {estimate:.1%} down to here")
        rows.append([Thumbnail(read(first), first, f"pair {number + 1:,}"), Thumbnail(read(second), second, note)])
    write_page(page, "Copies", summary, rows)
    return [table, equal, page]

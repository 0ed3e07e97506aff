"""find() and duplicates(): what lies near to what in an index."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from grainmill import trainable
from grainmill.corpus import duplicates as copies
from grainmill.corpus import index, nearest, thumbnails
from grainmill.corpus.embedder import Embedder
from grainmill.corpus.index import Index
from grainmill.errors import CorpusError
from grainmill.storage import files
from grainmill.storage.mirror import S3Files

PRECISION = 0.9
"""That a list of copies has, as estimated, unless a threshold is given."""
MOST = 100_000
"""Pairs that are listed."""
SHOWN = 100
"""Pairs on the page: the surest and, from the middle on, the least sure."""


class QueryResult(NamedTuple):
    """What a query found."""

    query: str
    error: str | None
    """Why it is no image."""
    ids: list[str]
    """Nearest first."""
    scores: list[float]


class DuplicatesResult(NamedTuple):
    """Pairs that may be copies."""

    pairs: list[tuple[str, str]]
    """Ids, the surest first."""
    scores: list[float]
    precision: list[float | None]
    """Of the list down to each pair, as estimated; None where the corpus is too small to tell."""
    more: bool
    """Whether there are more above the threshold, which score less."""
    files: list[Path]


def find(
    tracking_uri: str, model: str, folder: Path, queries: Sequence[str], count: int, page: Path
) -> list[QueryResult]:
    """The nearest images of an index for each query, exactly, and a page that shows them.

    Args:
        tracking_uri: MLflow's.
        model: the one that made the index, as `models:/name@alias` or `models:/name/version`.
        folder: of the index.
        queries: image files.
        count: images for each query.
        page: HTML file to write.
    Raises:
        CorpusError: there is no index, it is empty or of another model, or no query is an image.
        TrackingError: the model is not registered, or MLflow does not answer.
    """
    made = _filled(folder)
    embedder = Embedder(tracking_uri, model)
    index.check_model(made, embedder.identity)
    contents = [_content(Path(query)) for query in queries]
    readable = [one for one in contents if isinstance(one, bytes)]
    answers = iter(embedder(readable) if readable else ())
    told = [next(answers) if isinstance(one, bytes) else one for one in contents]
    errors = [one if isinstance(one, str) else one.error for one in told]
    good = [one.embedding for one in told if not isinstance(one, str) and one.embedding is not None]
    if not good:
        lines = [f"{query} {error}" for query, error in zip(queries, errors, strict=True)]
        raise CorpusError("a query must be an image, but none is:\n  " + "\n  ".join(lines))
    places, scores = nearest.top_k(np.stack(good), ((one.start, one.embeddings) for one in made.blocks()), count)
    names = _names(made, places)
    lists = iter(zip(places.tolist(), scores.tolist(), strict=True))
    found = []
    for query, error in zip(queries, errors, strict=True):
        where, near = ([], []) if error else next(lists)
        found.append(QueryResult(query, error, [names[place] for place in where], near))
    read = _reader(made)
    rows = [
        [thumbnails.Thumbnail(content, one.query, "query", query=True)]
        + [
            thumbnails.Thumbnail(read(name), name, f"{score:.4f}")
            for name, score in zip(one.ids, one.scores, strict=True)
        ]
        for one, content in zip(found, contents, strict=True)
        if isinstance(content, bytes) and not one.error
    ]
    told_of = f"{len(made):,} images of {made.record.source}, by {made.record.model.model}: nearest first, with scores"
    thumbnails.write_page(page, "Nearest images", told_of, rows)
    return found


def duplicates(folder: Path, precision: float, threshold: float | None, out: Path) -> DuplicatesResult:
    """Pairs of images of an index that may be copies: `duplicates.csv` and a page, `duplicates.html`.

    The estimated precision is that of `copies`.

    Args:
        folder: of the index.
        precision: of the whole list, as estimated, in (0, 1]; without effect where there is a threshold.
        threshold: the lowest score to list.
        out: folder for the files.
    Raises:
        CorpusError: there is no index, it is empty, or too small for an estimate and there is no threshold.
    """
    made = _filled(folder)
    tails = _tails(made)
    if threshold is None and tails is None:
        rule = f"an estimate of precision needs more than {copies.NEIGHBOURS} images"
        raise CorpusError(f"{rule}, but {folder.absolute()} has {len(made)}; give a --threshold")
    if threshold is not None:
        floor = threshold
    else:
        assert tails is not None, "told above"
        floor = tails.score_of((1 - precision) * MOST)  # below, a longer list would be needed for that precision

    def blocks(start: int) -> Iterator[nearest.Block]:
        return ((one.start, one.embeddings) for one in made.blocks(start))

    found = nearest.pairs(blocks, floor, MOST)
    sure = copies.precision(found.score, tails) if tails else None
    listed = len(found.score)
    if threshold is None and sure is not None:
        listed = int((sure >= precision).sum())
    names = _names(made, np.concatenate([found.first[:listed], found.second[:listed]]))
    places = zip(found.first[:listed].tolist(), found.second[:listed].tolist(), strict=True)
    pairs = [(names[a], names[b]) for a, b in places]
    estimate = [None] * listed if sure is None else sure[:listed].tolist()
    result = DuplicatesResult(pairs, found.score[:listed].tolist(), estimate, found.more and listed == MOST, [])
    result.files.extend(_write(result, made, out))
    return result


def _filled(folder: Path) -> Index:
    made = Index(folder)
    if not len(made):
        raise CorpusError(f"an index must hold images, but {folder.absolute()} has none yet; embed some")
    return made


def _tails(made: Index) -> copies.NullModel | None:
    """Of the different images around a sample; None if there are too few."""
    if len(made) <= copies.NEIGHBOURS:
        return None
    at = copies.sample(len(made))
    parts = ((one.start, one.embeddings) for one in made.blocks())
    some = np.concatenate([rows[at[(at >= start) & (at < start + len(rows))] - start] for start, rows in parts])
    parts = ((one.start, one.embeddings) for one in made.blocks())
    places, scores = nearest.top_k(some, parts, copies.NEIGHBOURS + 1)
    itself = places == at[:, None]
    itself[~itself.any(axis=1), -1] = True  # many equal ones pushed it out
    return copies.fit_null_model(scores[~itself].reshape(len(at), copies.NEIGHBOURS), len(made))


def _names(made: Index, places: NDArray[np.int64]) -> dict[int, str]:
    """Ids of rows."""
    wanted = set(places.ravel().tolist())
    return {place: name for place, name in enumerate(made.ids()) if place in wanted}


def _content(path: Path) -> bytes | str:
    """Of a file, or why it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _reader(made: Index) -> Callable[[str], bytes | None]:
    """Contents of an index's images; None of those that are gone."""
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
    """The table and the page."""
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(("first", "second", "score", "precision"))
    for (first, second), score, estimate in zip(found.pairs, found.scores, found.precision, strict=True):
        write((first, second, f"{score:.6f}", "" if estimate is None else f"{estimate:.4f}"))
    table, page = out / "duplicates.csv", out / "duplicates.html"
    files.write_text(table, text.getvalue())
    shown = [*range(len(found.pairs))]
    if len(shown) > SHOWN:
        shown = shown[: SHOWN // 2] + shown[-SHOWN // 2 :]
    read = _reader(made)
    rows = []
    for number in shown:
        (first, second), estimate = found.pairs[number], found.precision[number]
        note = f"{found.scores[number]:.4f}" + ("" if estimate is None else f", precision {estimate:.1%} down to here")
        rows.append(
            [
                thumbnails.Thumbnail(read(first), first, f"pair {number + 1:,}"),
                thumbnails.Thumbnail(read(second), second, note),
            ]
        )
    told = f"{len(found.pairs):,} pairs of {made.record.source}, the surest first"
    if len(rows) < len(found.pairs):
        told += f"; shown are the first and the last {SHOWN // 2}"
    thumbnails.write_page(page, "Copies", told, rows)
    return [table, page]

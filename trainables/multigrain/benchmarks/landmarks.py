"""Benchmarks of landmarks: Oxford5k and Paris6k, as published and revisited. A query is a box in an image."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from multigrain.benchmarks.base import by_stem, counted, demand, images, indices, noted, pictures, unread
from multigrain.benchmarks.safe_pickle import read_pickle
from multigrain.data.listing import list_images
from multigrain.data.picture import Picture
from multigrain.errors import DataError
from multigrain.evaluation.benchmark import Benchmark
from multigrain.retrieval.metrics import Truth

Box = tuple[float, float, float, float]

_TITLES = {"oxford5k": "Oxford5k", "paris6k": "Paris6k", "roxford5k": "Revisited Oxford", "rparis6k": "Revisited Paris"}
_SIZES = {"oxford5k": (5062, 5063), "paris6k": (6392,), "roxford5k": (4993,), "rparis6k": (6322,)}
"""Number of images in the database; the literature has both numbers for Oxford5k."""
_QUERIES = {"oxford5k": 55, "paris6k": 55, "roxford5k": 70, "rparis6k": 70}
_PREFIX = "oxc1_"
"""Prefix of the image names in Oxford5k's query files; the image files do not have it."""
_DAMAGED = {
    "louvre": (136, 146),
    "moulinrouge": (422,),
    "museedorsay": (1059,),
    "notredame": (188,),
    "pantheon": (284, 960, 974),
    "pompidou": (195, 196, 201, 467, 640),
    "sacrecoeur": (299, 330, 353),
    "triomphe": (662, 833, 863, 867),
}
DAMAGED = frozenset(f"paris_{place}_{number:06}" for place, numbers in _DAMAGED.items() for number in numbers)
"""The 20 images of Paris whose published files are corrupt; they do not belong to the set."""
_PARTS = ("query", "good", "ok", "junk")
SETTINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Part of the revisited protocol -> the lists of positives, and the lists of junk."""


class _Query(NamedTuple):
    name: str
    box: Box
    answers: Mapping[str, tuple[Collection[str], Collection[str]]]
    """Part of the protocol -> names of the positives and of the junk."""


def _box(values: Sequence[Any]) -> Box | None:
    """Return x1, y1, x2, y2 if the values are a box, else None."""
    try:
        x1, y1, x2, y2 = map(float, values)
    except (TypeError, ValueError):
        return None
    return (x1, y1, x2, y2) if math.isfinite(x1 + y1 + x2 + y2) and x1 < x2 and y1 < y2 else None


def _benchmark(
    name: str,
    root: Path,
    database: Sequence[str],
    files: Mapping[str, Path],
    queries: Sequence[_Query],
    measures: tuple[str, ...],
    problems: Iterable[str],
) -> Benchmark:
    """Build the benchmark from the names of its images; names without a file are left out, and noted as problems.

    Args:
        database: names in the order of the database, the names in the queries' answers included.
    """
    names = [image for image in database if image in files]
    place = {image: index for index, image in enumerate(names)}
    asked = [query for query in queries if query.name in files]
    settings = queries[0].answers
    demand(_TITLES[name], root, {"images that its ground truth names": names, "images of its queries": asked})
    truth = {
        setting: tuple(
            Truth(*(indices(place[image] for image in part if image in place) for part in query.answers[setting]))
            for query in asked
        )
        for setting in settings
    }
    answers = {image for query in queries for parts in query.answers.values() for part in parts for image in part}
    wanted = {*database, *answers, *(query.name for query in queries)} - DAMAGED
    twofold = [query.name for query in queries for good, junk in query.answers.values() if not {*good}.isdisjoint(junk)]
    beside: list[str] = []
    extra = pictures(images(root / "distractors", beside, deep=True)) if name in ("roxford5k", "rparis6k") else ()
    problems = [
        *problems,
        *beside,
        *(counted("images in the database", _SIZES[name][-1], len(names)) if len(names) not in _SIZES[name] else ()),
        *counted("queries", _QUERIES[name], len(asked)),
        *noted("images that the ground truth names are missing", sorted(wanted - files.keys())),
        *noted("queries have an image as positive and as junk", dict.fromkeys(twofold)),
    ]
    shown = tuple(Picture(files[query.name], query.box) for query in asked)
    images_of_set = pictures(files[image] for image in names)
    return Benchmark(name, (*images_of_set, *extra), shown, truth, measures, problems=tuple(problems))


def _names(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").split()


def _classic_query(query: str, parts: Mapping[str, Path], wrong: list[str]) -> _Query | None:
    """Read one query from its four files; add sentences on what cannot be read to `wrong`."""
    lacking = [f"{query}_{part}.txt" for part in _PARTS if part not in parts]
    if lacking:
        place = next(iter(parts.values())).parent
        wrong += [f"each query needs four files, but {', '.join(lacking)} is missing in {place}"]
        return None
    words = _names(parts["query"])
    box = _box(words[1:])
    if box is None:
        wrong.append(f"{parts['query']} must hold `image x1 y1 x2 y2`, x1 < x2 and y1 < y2, got {' '.join(words)!r}")
        return None
    good, ok, junk = ({*_names(parts[part])} - DAMAGED for part in _PARTS[1:])
    return _Query(words[0].removeprefix(_PREFIX), box, {"": (good | ok, junk)})


def classic(name: str, root: Path) -> Benchmark:
    """Read Oxford5k or Paris6k: images and files `<landmark>_<1 to 5>_{query,good,ok,junk}.txt`, anywhere below `root`.

    Positives are the images called good or ok. The query is a box in an image, which is itself a positive of its list.
    The 20 corrupt images of Paris6k are left out.

    Raises:
        DataError: images or queries are missing altogether, a query does not have four files, or a file is malformed.
    """
    listing = list_images(root)
    every = by_stem(root / name for name in listing.names)
    files = {image: path for image, path in every.items() if re.fullmatch(r"[A-Za-z_]+_[0-9]{6}", image)}
    texts: dict[str, dict[str, Path]] = {}
    wrong: list[str] = []
    for path in (root / name for name in listing.left_out):
        if match := re.fullmatch(rf"(.+_[0-9]+)_({'|'.join(_PARTS)})\.txt", path.name):
            first = texts.setdefault(match[1], {}).setdefault(match[2], path)
            if first != path:
                wrong.append(f"the ground truth must be there once, but there are {first} and {path}; keep one")
    truth = f"ground truth <landmark>_<1 to 5>_{{{','.join(_PARTS)}}}.txt"
    demand(_TITLES[name], root, {"images <landmark>_NNNNNN.jpg": files, truth: texts})
    read = [_classic_query(query, parts, wrong) for query, parts in sorted(texts.items())]
    if wrong:
        raise DataError(wrong)
    problems = noted("images are not of the set and left out", sorted(every.keys() - files.keys()))
    problems += unread(root, listing)
    database = sorted(files.keys() - DAMAGED)
    return _benchmark(name, root, database, files, [query for query in read if query], ("map", "map_finite"), problems)


def _revisited_query(file: Path, number: int, name: str, gnd: Any, imlist: Sequence[str], wrong: list[str]) -> _Query:
    """Read one query from its entry in the pickle; add sentences on what is malformed to `wrong`."""
    parts: dict[str, list[str]] = {}
    gnd = gnd if isinstance(gnd, dict) else {}
    for part in ("easy", "hard", "junk"):
        numbers = gnd.get(part)
        sound = isinstance(numbers, list) and all(type(index) is int and 0 <= index < len(imlist) for index in numbers)
        if not sound:
            wrong.append(
                f"{file}, gnd[{number}]: {part!r} must be a list of indices into the {len(imlist)} names of imlist, "
                f"got {numbers!r:.80}"
            )
        parts[part] = [imlist[index] for index in numbers] if sound else []
    box = _box(gnd.get("bbx") or ())
    if box is None:
        wrong.append(f"{file}, gnd[{number}]: 'bbx' must be x1, y1, x2, y2 with x1 < x2, y1 < y2, got {gnd.get('bbx')}")
    answers = {
        setting: ([image for part in good for image in parts[part]], [image for part in junk for image in parts[part]])
        for setting, (good, junk) in SETTINGS.items()
    }
    return _Query(name, box or (0.0, 0.0, 1.0, 1.0), answers)


def _held(file: Path) -> tuple[list[str], list[str], list[Any]]:
    """Read the names in the database, the names of the queries, and an entry for each query."""
    held = read_pickle(file)
    entries: list[Any] = [held.get(key) if isinstance(held, dict) else None for key in ("imlist", "qimlist", "gnd")]
    imlist, qimlist, gnd = entries
    wrong = [
        f"{file} must hold a list of names {key!r}, got {names!r:.80}"
        for key, names in (("imlist", imlist), ("qimlist", qimlist))
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names)
    ]
    if not isinstance(gnd, list) or (not wrong and len(gnd) != len(qimlist)):
        wrong.append(f"{file} must hold a list 'gnd' with an entry for each name of qimlist, got {gnd!r:.80}")
    if wrong:
        raise DataError(wrong)
    return imlist, qimlist, gnd


def revisited(name: str, root: Path) -> Benchmark:
    """Read revisited Oxford or Paris: `jpg/` and `gnd_<name>.pkl` in the root, or in `<name>/` below it.

    The database is in the order of the pickle's `imlist`, as published features are. All images below `distractors/`
    follow, for example the million. Queries are not in the database.

    Raises:
        DataError: images or queries are missing altogether, or the pickle is malformed or unsafe.
    """
    root = root / name if (root / name).is_dir() else root
    file = root / f"gnd_{name}.pkl"
    problems: list[str] = []
    found = images(root / "jpg", problems)
    demand(_TITLES[name], root, {"images in jpg/": found, file.name: file.is_file()})
    files = by_stem(found)
    imlist, qimlist, gnd = _held(file)
    wrong: list[str] = []
    queries = [
        _revisited_query(file, number, image, entry, imlist, wrong)
        for number, (image, entry) in enumerate(zip(qimlist, gnd, strict=True))
    ]
    if wrong:
        raise DataError(wrong)
    strange = sorted(files.keys() - {*imlist, *qimlist} - DAMAGED)
    problems += noted("images in jpg/ are not of the set and left out", strange)
    measures = ("map", "map_finite", "mp@1", "mp@5", "mp@10")
    return _benchmark(name, root, imlist, files, queries, measures, problems)

"""Benchmarks whose truth follows from the numbers in file names: INRIA Holidays, UKBench, INRIA Copydays."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

from multigrain.benchmarks.base import counted, demand, images, indices, noted, pictures, unread
from multigrain.data.copies import BLOCK, read_copies
from multigrain.data.listing import list_images
from multigrain.data.picture import Picture
from multigrain.errors import DataError
from multigrain.evaluation.benchmark import Benchmark
from multigrain.retrieval.metrics import Truth

TURNS = "rotations.txt"
_TURNED = {90: 200, 180: 1, 270: 27}
"""Degrees clockwise -> number of images of Holidays that are turned by them [R]."""
_MEASURES = ("map", "map_finite", "micro_ap", "recall@p90")
_COPIES = {
    "strong": 229,
    **{f"crops/{percent}": 157 for percent in (10, 15, 20, 30, 40, 50, 60, 70, 80)},
    **{f"jpegqual/{quality}": 157 for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)},
}
"""Folder of copies in Copydays -> number of its images."""


def _numbered(folder: Path, form: str) -> tuple[dict[int, Path], list[str]]:
    """Map the number in an image's name, which group 1 of the pattern `form` finds, to the image, ascending.

    Also returned are sentences on what is left out, such as images whose names do not match.
    """
    numbered: dict[int, Path] = {}
    strange: list[str] = []
    problems: list[str] = []
    for path in images(folder, problems):
        match = re.fullmatch(form, path.stem)
        if match is None or numbered.setdefault(int(match[1]), path) != path:
            strange.append(path.name)
    problems += noted(f"images in {folder} are not of the set and left out", strange)
    return dict(sorted(numbered.items())), problems


def _turns(file: Path, names: Collection[str]) -> tuple[dict[str, int], list[str]]:
    """Read how many degrees clockwise each image, given by its name without suffix, is turned; and what is missing."""
    if not file.is_file():
        raise DataError(
            [
                f"holidays-upright needs {file}, with a line `name degrees` for each turned image, but there is no "
                "such file; add it, or evaluate `holidays`"
            ]
        )
    turns: dict[str, int] = {}
    wrong = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match line.split():
            case []:
                continue
            case [name, degrees] if degrees in map(str, _TURNED) and Path(name).stem not in turns:
                turns[Path(name).stem] = int(degrees)
            case _:
                wrong.append(
                    f"{file}, line {number}: a line must be a name, once, and 90, 180 or 270 degrees, got {line!r}"
                )
    if wrong:
        raise DataError(wrong)
    problems = noted("turned images are missing", sorted(turns.keys() - names))
    for turn, expected in _TURNED.items():
        problems += counted(f"images turned by {turn} degrees", expected, [*turns.values()].count(turn))
    return turns, problems


def holidays(root: Path, upright: bool = False) -> Benchmark:
    """Read INRIA Holidays: `jpg/NNNNNN.jpg`, 1,491 images in 500 groups of equal number // 100.

    The first image of a group, a multiple of 100, is the query; it is no item of its own list.

    Args:
        upright: turn images as `rotations.txt` says, which holds a line `name degrees` (clockwise) for each of them;
            the protocol turns 228 images.
    Raises:
        DataError: no query has another image of its group, or the turns are missing or wrong.
    """
    numbered, problems = _numbered(root / "jpg", "([0-9]{6})")
    groups: dict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(numbered):
        groups[number // 100].append(index)
    numbers, paths = [*numbered], [*numbered.values()]
    queries = [index for index, number in enumerate(numbers) if number % 100 == 0]
    answers = {query: [index for index in groups[numbers[query] // 100] if index != query] for query in queries}
    demand("INRIA Holidays", root, {"images jpg/NNNN00.jpg and others of the same NNNN": any(answers.values())})
    turns: dict[str, int] = {}
    if upright:
        turns, wrong = _turns(root / TURNS, {path.stem for path in paths})
        problems += wrong
    problems += counted("images", 1491, len(paths)) + counted("queries", 500, len(queries))
    headless = [group * 100 for group, members in groups.items() if members[0] not in answers]
    problems += noted("queries are missing", headless)
    alone = [numbers[query] for query in queries if not answers[query]]
    problems += noted("queries have no other image of their group", alone)
    database = tuple(Picture(path, turn=turns.get(path.stem, 0)) for path in paths)
    truth = {"": tuple(Truth(indices(answers[query]), indices([query])) for query in queries)}
    name, shown = "holidays-upright" if upright else "holidays", tuple(database[query] for query in queries)
    return Benchmark(name, database, shown, truth, ("map", "map_finite"), problems=tuple(problems))


def ukbench(root: Path) -> Benchmark:
    """Read UKBench: `ukbench00000.jpg` to `ukbench10199.jpg`, 4 images of each of 2,550 objects, number // 4.

    Every image is a query, and is an item of its own list: all 4 nearest items can show its object.

    Raises:
        DataError: there are no such images.
    """
    found, problems = _numbered(root, "ukbench([0-9]{5})")
    numbered = {number: path for number, path in found.items() if number < 10_200}
    demand("UKBench", root, {"images ukbenchNNNNN.jpg": numbered})
    missing = [f"ukbench{number:05}.jpg" for number in range(10_200) if number not in numbered]
    beyond = [path.name for number, path in found.items() if number not in numbered]
    problems += counted("images", 10_200, len(numbered)) + noted("images are missing", missing)
    problems += noted("images are beyond ukbench10199.jpg and left out", beyond)
    groups: dict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(numbered):
        groups[number // 4].append(index)
    truth = tuple(Truth(indices(groups[number // 4]), indices(())) for number in numbered)
    database = pictures(numbered.values())
    return Benchmark("ukbench", database, database, {"": truth}, ("ukb",), problems=tuple(problems))


def _copies(root: Path, setting: str, originals: Mapping[int, int]) -> tuple[list[tuple[Path, int]], list[str]]:
    """Pair the copies in one folder with the index of their original; and sentences on missing or extra files."""
    found, strange, orphans = [], [], []
    problems: list[str] = []
    for path in images(root / setting, problems):
        if not re.fullmatch("[0-9]{6}", path.stem):
            strange.append(path.name)
        elif (block := int(path.stem[:BLOCK])) in originals:
            found.append((path, originals[block]))
        else:
            orphans.append(path.name)
    problems += noted(f"images in {setting}/ are not of the set and left out", strange)
    problems += noted(f"copies in {setting}/ have no original and are left out", orphans)
    return found, problems + counted(f"copies in {setting}/", _COPIES[setting], len(found))


def copydays(root: Path) -> Benchmark:
    """Read INRIA Copydays: 157 originals `NNNN00.jpg`, in `original/` or in the root, and 229 copies in `strong/`.

    The part `strong` is the protocol of the paper. Each folder `crops/<10 to 80>/` and `jpegqual/<3 to 75>/` that holds
    copies is a further part. Each part asks its own queries only. The database is the originals and all images below
    `distractors/`, for example 10,000 (CD10k).

    A set of one's own, whose originals have other names, is read by `copies.read_copies`, with the part `strong` only.

    Raises:
        DataError: there are no originals or no strong copies of one.
    """
    folder = root / "original" if (root / "original").is_dir() else root
    originals, problems = _numbered(folder, "([0-9]{4})00")
    if not originals and folder != root and images(folder, []) and images(root / "strong", []):
        return _own_copies(root)
    place = {block: index for index, block in enumerate(originals)}
    copies = {}
    for setting in _COPIES:
        listing = list_images(root / setting, deep=False)
        if setting == "strong" or listing.names or listing.left_out:
            found, wrong = _copies(root, setting, place)
            problems += wrong
            if found or setting == "strong":
                copies[setting] = found
            else:
                problems.append(f"{setting}/ holds no copy of an original and is left out")
    strong = copies["strong"] if originals else list_images(root / "strong", deep=False).names
    wanted = {
        "originals NNNN00.jpg or original/NNNN00.jpg": originals,
        "strong copies strong/NNNNNN.jpg of the originals": strong,
    }
    demand("INRIA Copydays", root, wanted)
    problems += counted("originals", 157, len(originals))
    database = (*originals.values(), *images(root / "distractors", problems, deep=True))
    elsewhere = Truth(indices(()), indices(range(len(database))))
    truth = {
        setting: tuple(
            Truth(indices([original]), indices(())) if other == setting else elsewhere
            for other, pairs in copies.items()
            for _, original in pairs
        )
        for setting in copies
    }
    queries = pictures(path for pairs in copies.values() for path, _ in pairs)
    return Benchmark("copydays", pictures(database), queries, truth, _MEASURES, problems=tuple(problems))


def _own_copies(root: Path) -> Benchmark:
    copies, listing = read_copies(root)
    truth = tuple(Truth(indices([original]), indices(())) for original in copies.truth)
    problems = [f"no original is named NNNN00, so {root} is read as a set of its own", *unread(root, listing)]
    shown, asked = pictures(copies.database), pictures(copies.queries)
    return Benchmark("copydays", shown, asked, {"strong": truth}, _MEASURES, problems=tuple(problems))

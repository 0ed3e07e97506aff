"""Image folders: what lies on disk -> lists of files with their class and instance; what is wrong with them.

No torch here: the experiment file is checked, folders included, before anything heavy is loaded.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from multigrain.data.dataset import Copies, Dataset
from multigrain.errors import DataError
from multigrain.hooks import Item

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
BLOCK = 4
"""Digits that name the original image in a Copydays file name."""


def stable_order(name: str) -> str:
    """A sort key that shuffles names the same way on every machine and for ever."""
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _class_folders(root: Path) -> dict[str, list[Path]]:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {folder.name: _files(folder) for folder in folders}


def split(
    by_class: dict[str, list[Item]], share: float, key: Callable[[str, Item], str]
) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
    """Hold out a share of each class of two or more, one image at least and not all, by the hash of its key."""
    train, val = {}, {}
    for name, items in by_class.items():
        order = sorted(range(len(items)), key=lambda index: stable_order(key(name, items[index])))
        held_out = set(order[: min(max(1, round(share * len(items))), len(items) - 1)])
        train[name] = [item for index, item in enumerate(items) if index not in held_out]
        val[name] = [item for index, item in enumerate(items) if index in held_out]
    return train, val


def read_copies(root: Path) -> Copies:
    """An INRIA Copydays folder: `original/NNNN00.jpg`, `strong/NNNNkk.jpg`, optionally `distractors/`.

    The queries are the strong copies, as in the paper; the database is the originals and the distractors.

    Raises:
        DataError: a folder is missing or empty, or a copy has no original.
    """
    originals, strong = _files(root / "original"), _files(root / "strong")
    problems = [
        f"a copy-detection set needs images in {root / name}, found none"
        for name, found in (("original", originals), ("strong", strong))
        if not found
    ]
    block = {path.stem[:BLOCK]: index for index, path in enumerate(originals)}
    problems += [
        f"the first {BLOCK} characters of a copy name its original, but {root / 'original'} has none for {path}"
        for path in strong
        if originals and path.stem[:BLOCK] not in block
    ]
    if problems:
        raise DataError(problems)
    database = (*originals, *_files(root / "distractors"))
    return Copies(database, tuple(strong), tuple(block[path.stem[:BLOCK]] for path in strong))


def _parts(
    folder: Path, val_share: float
) -> tuple[dict[str, list[Path]], dict[str, list[Path]], list[Path], list[str]]:
    """Training and held-out files by class, class folders without any, and what else is wrong."""
    problems: list[str] = []
    if (folder / "train").is_dir():
        train = _class_folders(folder / "train")
        val = _class_folders(folder / "val") if (folder / "val").is_dir() else {}
        if not val:
            problems.append(f"a folder with train/ needs val/<class>/ too, but there is none in {folder}")
        problems += [
            f"each class of val/ must be in train/, but there is no {folder / 'train' / name}"
            for name in val
            if name not in train
        ]
        empty = [
            folder / part / name
            for part, found in (("train", train), ("val", val))
            for name in found
            if not found[name]
        ]
    else:
        by_class = _class_folders(folder)
        by_class.pop("copies", None)
        empty = [folder / name for name, paths in by_class.items() if not paths]
        few = [name for name, paths in by_class.items() if len(paths) == 1]
        problems += [f"a class needs 2 images to be split, found 1 in {folder / name}" for name in few]
        several = {name: paths for name, paths in by_class.items() if len(paths) > 1}
        train, val = split(several, val_share, lambda name, path: f"{name}/{path.name}")
        if not by_class:
            problems.append(f"images are expected in {folder}/<class>/, but it has no folders")
    return train, val, empty, problems


def read_dataset(folder: Path, val_share: float = 0.2) -> Dataset:
    """List the images of a folder.

    Raises:
        DataError: with everything that is wrong about the folder's layout.
    """
    if not os.path.isdir(folder):
        raise DataError([f"the image folder must exist, but there is no folder {folder.absolute()}"])
    train, val, empty, problems = _parts(folder, val_share)
    problems += [
        f"a class folder must hold images ({', '.join(sorted(SUFFIXES))}), found none in {path}" for path in empty
    ]
    if train and sum(map(len, train.values())) == 1:
        problems.append(f"training needs at least 2 images, found 1 in {folder}")
    copies = None
    if (folder / "copies").is_dir():
        try:
            copies = read_copies(folder / "copies")
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    classes = tuple(train)
    return Dataset(
        classes,
        tuple(path for paths in train.values() for path in paths),
        tuple(label for label, paths in enumerate(train.values()) for _ in paths),
        tuple(path for paths in val.values() for path in paths),
        tuple(classes.index(name) for name, paths in val.items() for _ in paths),
        copies,
    )

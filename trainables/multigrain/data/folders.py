"""Image folders: list the files of a folder as a `Dataset`, or report everything that is wrong with its layout.

This module does not import torch: an experiment file is checked, its folders included, before anything heavy is loaded.
"""

import os
from collections.abc import Callable
from pathlib import Path

from multigrain.data.dataset import CopySet, Dataset
from multigrain.digests import digest
from multigrain.errors import DataError
from multigrain.hooks import Item

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""Suffixes of image files, in lower case."""
BLOCK = 4
"""Number of characters that name the original image in a Copydays file name."""


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def stable_order(name: str) -> str:
    """Return a sort key that shuffles names in the same way on every machine and in every version."""
    return digest(name.encode(errors="surrogateescape"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if is_image(path.name) and path.is_file())


def _class_folders(root: Path) -> dict[str, list[Path]]:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {folder.name: _files(folder) for folder in folders}


def split(
    by_class: dict[str, list[Item]], share: float, key: Callable[[str, Item], str]
) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
    """Split each class into training and held-out items, by the hash of their keys.

    Args:
        by_class: at least two items for each class.
        share: share of each class that is held out; at least one item, and not all.
        key: gives the name of an item, from its class and the item.
    """
    train, val = {}, {}
    for name, items in by_class.items():
        order = sorted(range(len(items)), key=lambda index: stable_order(key(name, items[index])))
        held_out = set(order[: min(max(1, round(share * len(items))), len(items) - 1)])
        train[name] = [item for index, item in enumerate(items) if index not in held_out]
        val[name] = [item for index, item in enumerate(items) if index in held_out]
    return train, val


def read_copies(root: Path) -> CopySet:
    """List an INRIA Copydays folder: `original/NNNN00.jpg`, `strong/NNNNkk.jpg`, optionally `distractors/`.

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
    return CopySet(database, tuple(strong), tuple(block[path.stem[:BLOCK]] for path in strong))


ByClass = dict[str, list[Path]]


def _two_parts(folder: Path) -> tuple[ByClass, ByClass, list[Path], list[str]]:
    """List `train/` and `val/` by class; also return empty class folders, and what else is wrong."""
    train = _class_folders(folder / "train")
    val = _class_folders(folder / "val") if (folder / "val").is_dir() else {}
    problems = [] if val else [f"a folder with train/ needs val/<class>/ too, but there is none in {folder}"]
    problems += [
        f"each class of val/ must be in train/, but there is no {folder / 'train' / name}"
        for name in val
        if name not in train
    ]
    parts = (("train", train), ("val", val))
    return train, val, [folder / part / name for part, found in parts for name in found if not found[name]], problems


def _one_part(folder: Path, val_share: float) -> tuple[ByClass, ByClass, list[Path], list[str]]:
    """List the class folders, split; also return empty class folders, and what else is wrong."""
    by_class = _class_folders(folder)
    by_class.pop("copies", None)
    problems = [
        f"a class needs 2 images to be split, found 1 in {folder / name}"
        for name, paths in by_class.items()
        if len(paths) == 1
    ]
    if not by_class:
        problems.append(f"images are expected in {folder}/<class>/, but it has no folders")
    several = {name: paths for name, paths in by_class.items() if len(paths) > 1}
    train, val = split(several, val_share, lambda name, path: f"{name}/{path.name}")
    return train, val, [folder / name for name, paths in by_class.items() if not paths], problems


def read_dataset(folder: Path, val_share: float = 0.2) -> Dataset:
    """List the images of a folder.

    Args:
        folder: `train/<class>/`, `val/<class>/` and, optionally, `copies/`; or just `<class>/`.
        val_share: share of each class that is held out if there is no `train/`.
    Raises:
        DataError: names everything that is wrong with the layout of the folder.
    """
    if not os.path.isdir(folder):
        raise DataError([f"the image folder must exist, but there is no folder {folder.absolute()}"])
    has_parts = (folder / "train").is_dir()
    train, val, empty, problems = _two_parts(folder) if has_parts else _one_part(folder, val_share)
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

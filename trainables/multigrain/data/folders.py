"""Image folders: list the files of a folder as a `Dataset`, or report everything that is wrong with its layout.

This module does not import torch: an experiment file is checked, its folders included, before anything heavy is loaded.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from multigrain.data.copies import read_copies
from multigrain.data.dataset import Dataset
from multigrain.data.layout import alike_problems, halves, shape_problems, spelling
from multigrain.data.listing import SUFFIXES, Listing, list_by_folder, list_folders, list_images
from multigrain.digests import digest
from multigrain.errors import DataError
from multigrain.hooks import Item

COPIES = "copies"
"""Folder of the copy-detection set, beside the folders of classes."""


def stable_order(name: str) -> str:
    """Return a sort key that shuffles names in the same way on every machine and in every version."""
    return digest(name.encode(errors="surrogateescape"))


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


ByClass = dict[str, list[Path]]


def _two_parts(folder: Path) -> tuple[ByClass, ByClass, Listing, list[str]]:
    """List `train/` and `val/` by class; also return the whole listing, and what is wrong."""
    names = {part: list_folders(folder / part) for part in ("train", "val")}
    by_place, listing = list_by_folder(folder, [f"{part}/{name}" for part in names for name in names[part]])
    train, val = ({name: by_place[f"{part}/{name}"] for name in names[part]} for part in names)
    problems = _empty(folder, by_place, listing)
    for part, classes in names.items():
        images = (name.removeprefix(f"{part}/") for name in listing.names if name.startswith(f"{part}/"))
        problems += shape_problems(folder / part, classes, images, whole=False)
    if not val:
        _, others = halves(list_folders(folder))
        remedy = f"; if {others[0]} is that, rename it" if others and "val" not in others else ""
        problems.append(f"a folder with train/ needs val/<class>/ too, but there is none in {folder}{remedy}")
    problems += alike_problems((*train, *val), folder)
    seen = {spelling(name).casefold(): name for name in train}
    for name in val:
        if name not in train:
            near = seen.get(spelling(name).casefold())
            hint = f", only {near!r}" if near else ""
            problems.append(f"each class of val/ must be in train/, but there is no {folder / 'train' / name}{hint}")
    return train, val, listing, problems


def _one_part(folder: Path, val_share: float) -> tuple[ByClass, ByClass, Listing, list[str]]:
    """List the class folders, split; also return the whole listing, and what is wrong."""
    classes = [name for name in list_folders(folder) if name != COPIES]
    by_class, listing = list_by_folder(folder, classes)
    problems = _empty(folder, by_class, listing)
    problems += shape_problems(folder, classes, listing.names, whole=True) + alike_problems(classes, folder)
    problems += [
        f"a class needs 2 images to be split, found 1 in {folder / name}"
        for name, paths in by_class.items()
        if len(paths) == 1
    ]
    if not by_class:
        problems.append(f"images are expected in {folder}/<class>/, but it has no folders")
    several = {name: paths for name, paths in by_class.items() if len(paths) > 1}
    train, val = split(several, val_share, lambda name, path: f"{name}/{path.name}")
    return train, val, listing, problems


def _empty(folder: Path, by_place: Mapping[str, Sequence[Path]], listing: Listing) -> list[str]:
    """Return a sentence on each class folder without images, with the first of what is left out there."""
    beside: dict[str, str] = {}
    for name, reason in listing.unread.items():
        place = next((place for place in (name, *map(str, Path(name).parents)) if place in by_place), "")
        beside.setdefault(place, f", only {name}, which {reason}")
    types = ", ".join(sorted(SUFFIXES))
    return [
        f"a class folder must hold images ({types}), found none in {folder / place}{beside.get(place, '')}"
        for place, paths in by_place.items()
        if not paths
    ]


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
    train, val, listing, problems = _two_parts(folder) if has_parts else _one_part(folder, val_share)
    if train and sum(map(len, train.values())) == 1:
        problems.append(f"training needs at least 2 images, found 1 in {folder}")
    copies, (left_out, litter) = None, _beside(folder, has_parts)
    left_out, litter = {**left_out, **listing.left_out}, litter + listing.litter
    if (folder / COPIES).is_dir():
        try:
            copies, of_copies = read_copies(folder / COPIES)
            left_out |= {f"{COPIES}/{name}": reason for name, reason in of_copies.left_out.items()}
            litter += of_copies.litter
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
        left_out=left_out,
        litter=litter,
    )


def _beside(folder: Path, has_parts: bool) -> tuple[dict[str, str], int]:
    """Return the names of images and folders outside of all class folders, with that reason; and count litter there."""
    left_out, litter = dict[str, str](), 0
    for place in ("", "train/", "val/") if has_parts else ("",):
        found = list_images(folder / place, deep=False)
        left_out |= {f"{place}{name}": "lies outside the folders of classes" for name in found.names}
        left_out |= {f"{place}{name}": reason for name, reason in found.unread.items()}
        litter += found.litter
    if has_parts:
        others = [name for name in list_folders(folder) if name not in ("train", "val", COPIES)]
        left_out |= {f"{name}/": "is none of the folders train, val and copies" for name in others}
    return left_out, litter

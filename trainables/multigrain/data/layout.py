"""Folders whose layout is surely another one than that of class folders: halves, folders of folders, names alike."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

_TRAIN = {"train", "training", "trn"}
_HELD_OUT = {"val", "valid", "validation", "validate", "eval", "evaluation", "test", "testing", "dev", "holdout"}


def spelling(name: str) -> str:
    """Return the name of a class without what nobody sees: outer and repeated blanks, and the form of accents."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def alike_problems(names: Iterable[str], where: object) -> list[str]:
    """Return a sentence for each group of classes whose names look the same."""
    groups = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[spelling(name)].append(ascii(name))
    rule = "names of classes must differ by more than blanks or the form of an accent"
    return [
        f"{rule}, but {where} has {' and '.join(group)}; make them one" for group in groups.values() if len(group) > 1
    ]


def halves(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of folders that commonly hold training images, and those that hold held-out ones."""
    words = {name: re.sub("(set|data|images)$", "", re.sub("[^a-z]", "", name.casefold())) for name in names}
    train, held_out = ([name for name in names if words[name] in known] for known in (_TRAIN, _HELD_OUT))
    return train, held_out


def shape_problems(root: Path, classes: Sequence[str], images: Iterable[str], whole: bool) -> list[str]:
    """Return a sentence on what is surely wrong with the folders that are taken for classes.

    A class folder holds its images itself. It may have some in subfolders, too; but not only there if it has several
    subfolders with images, or if this is so for all classes.

    Args:
        root: folder above the class folders.
        classes: their names.
        images: names of the images below `root`, relative to it.
        whole: whether `root` is the image folder, else it is one half of it.
    """
    if whole and all(halves(classes)):
        found = " and ".join(repr(name) for half in halves(classes) for name in half)
        rule = "the halves of a data set must be called train and val"
        return [f"{rule}, but {root} has {found}, which would be classes; rename them, or use a manifest"]
    own, below = set[str](), defaultdict[str, dict[str, None]](dict)
    for name in images:
        place, first, *deeper = name.split("/")
        if deeper:
            below[place][first] = None
        else:
            own.add(place)
    nested = {place: list(folders) for place, folders in below.items() if place not in own}
    for place, folders in nested.items():
        if whole and (len(classes) == 1 or all(halves(folders))):
            rule = "the image folder must hold the folders of classes, or train and val"
            return [f"{rule}, but {root / place} does, with {_some(folders)}; name that folder"]
    if not own or any(len(folders) > 1 for folders in nested.values()):
        rule = "a class folder must hold its images itself"
        remedy = "if those are the classes, move them up and merge those of one name; if not, move their images up"
        return [
            f"{rule}, but {root / place} holds only folders with images ({_some(folders)}); {remedy}"
            for place, folders in nested.items()
        ]
    return []


def _some(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more

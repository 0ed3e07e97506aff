"""Findings in the images of a data set: figures to look at before a training, and warnings.

This module does not import torch.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from multigrain.data.dataset import Dataset
from multigrain.data.listing import OTHER, by_reason
from multigrain.data.validation import ImageFacts

IMBALANCE = 100
"""Ratio of the largest class to the smallest from which a warning is given."""
ALIKE = 4
"""Largest number of different bits between the outlines of images that look alike.

Of 7.5 million pairs of different photographs, none was as near; of copies in another size or quality, nine in ten were.
"""
SHOWN = 3
"""Number of examples in a line."""


class Findings(NamedTuple):
    """Findings in images, for people and for machines."""

    figures: Mapping[str, str]
    """Lines of a table: a word and what was counted."""
    warnings: Sequence[str]
    """Sentences on what will probably not give what the user expects."""
    facts: Mapping[str, Any]
    """The same figures as plain data."""


def find(dataset: Dataset, examined: Mapping[Path, ImageFacts | str]) -> Findings:
    """Count classes, images, formats, sizes and repeats of a data set; warn of what looks like a mistake.

    Args:
        dataset: the images as they were listed.
        examined: result of `validation.examine`; images that cannot be used count as left out.
    """
    images = {path: facts for path, facts in examined.items() if isinstance(facts, ImageFacts)}
    name = _shortened_names(dataset.paths)
    sizes, copies = Counter(dataset.train_labels), dataset.copies
    of_class = {label: sizes[index] for index, label in enumerate(dataset.classes)}
    left_out = {
        **dataset.left_out,
        **{name(path): fault for path, fault in examined.items() if isinstance(fault, str)},
    }
    groups = _equal_groups(images)
    areas = sorted((facts.width * facts.height, facts.width, facts.height) for facts in images.values())
    facts: dict[str, Any] = {
        "classes": of_class,
        "train": len(dataset.train),
        "val": len(dataset.val),
        "copies": copies and {"database": len(copies.database), "queries": len(copies.queries)},
        "formats": dict(Counter(one.format for one in images.values()).most_common()),
        "pixels": [areas[at][1:] for at in (0, len(areas) // 2, -1)],
        "turned": sum(one.turned for one in images.values()),
        "repeats": [[name(path) for path in group] for group in groups],
        "left_out": by_reason(left_out),
        "hidden": dataset.litter,
    }
    warnings = [
        *_class_warnings(of_class),
        *_repeat_warnings(dataset, images, groups, name),
        *_left_out_warnings(left_out),
    ]
    return Findings(_figures(facts), warnings, facts)


def all_equal(examined: Mapping[Path, ImageFacts | str]) -> bool:
    """Return whether there are several images, and all have the same content."""
    contents = [facts.content for facts in examined.values() if isinstance(facts, ImageFacts)]
    return len(contents) > 1 and len(set(contents)) == 1


def _figures(facts: Mapping[str, Any]) -> dict[str, str]:
    counts = sorted(facts["classes"].items(), key=lambda item: (item[1], item[0]))
    (fewest, few), (most, many) = counts[0], counts[-1]
    figures = {
        "classes": f"{len(counts):,}, of {few:,} ({fewest}) to {many:,} ({most}) training images",
        "images": f"{facts['train']:,} to train on, {facts['val']:,} held out",
    }
    if facts["copies"]:
        figures["copies"] = "{queries:,} of {database:,} images".format(**facts["copies"])
    figures["formats"] = ", ".join(f"{kind} {count:,}" for kind, count in facts["formats"].items())
    low, middle, high = (f"{width:,} x {height:,}" for width, height in facts["pixels"])
    turned = f"; {facts['turned']:,} turned as their EXIF data say" if facts["turned"] else ""
    figures["pixels"] = f"{low} to {high}, median {middle}{turned}"
    if facts["repeats"]:
        repeats = sum(map(len, facts["repeats"])) - len(facts["repeats"])
        figures["repeats"] = f"{repeats:,} images have the content of another"
    if facts["left_out"] or facts["hidden"]:
        hidden = f"; {facts['hidden']:,} hidden or left behind by systems" if facts["hidden"] else ""
        names = [name for names in facts["left_out"].values() for name in names]
        figures["left out"] = f"{len(names):,}{': ' if names else ''}{_examples(names)}{hidden}"
    return figures


def _class_warnings(of_class: Mapping[str, int]) -> Iterable[str]:
    if len(of_class) == 1:
        yield (
            f"there is one class only, {next(iter(of_class))!r}, so top1 is 1 for any network; classes are the folders "
            "below train/, or the column `class` of a manifest"
        )
    if single := [label for label, count in of_class.items() if count == 1]:
        yield f"{_several(len(single), 'class has', 'classes have')} one training image only: {_examples(single)}"
    fewest, most = (choose(of_class, key=lambda label: of_class[label]) for choose in (min, max))
    if of_class[most] >= IMBALANCE * of_class[fewest]:
        yield (
            f"classes are of very different sizes, from {of_class[fewest]:,} ({fewest}) to {of_class[most]:,} ({most}) "
            "training images; the network will seldom answer with the small ones"
        )
    spellings = defaultdict(list)
    for label in of_class:
        spellings[label.casefold()].append(label)
    for labels in spellings.values():
        if len(labels) > 1:
            yield f"the classes {' and '.join(map(repr, labels))} differ only by case; join them if they are one class"


def _repeat_warnings(
    dataset: Dataset,
    images: Mapping[Path, ImageFacts],
    groups: Sequence[Sequence[Path]],
    name: Callable[[Path], str],
) -> Iterable[str]:
    train, copies = set(dataset.train), dataset.copies
    held_out = {*dataset.val, *((*copies.database, *copies.queries) if copies else ())} - train
    seen = [
        (next(path for path in group if path in held_out), next(path for path in group if path in train))
        for group in groups
        if not train.isdisjoint(group) and not held_out.isdisjoint(group)
    ]
    if seen:
        yield _of_pairs(seen, "held-out image has", "held-out images have", "the content of a training image", name)
    labels = dict(zip((*dataset.train, *dataset.val), (*dataset.train_labels, *dataset.val_labels), strict=True))
    torn = []
    for group in groups:
        first = next((path for path in group if path in labels), None)
        other = next((path for path in group if first and labels.get(path, labels[first]) != labels[first]), None)
        if first and other:
            torn.append((first, other))
    if torn:
        yield _of_pairs(torn, "image is", "images are", "in two classes with the same content", name)
    equal = {path for group in groups for path in group}
    outlines = {path: facts.outline for path, facts in images.items() if any(facts.outline)}  # not of flat images
    near = alike(
        {path: outlines[path] for path in outlines if path in held_out - equal},
        {path: outlines[path] for path in outlines if path in train},
    )
    if near:
        yield _of_pairs(near, "held-out image looks", "held-out images look", "like a training image", name)


def alike(held_out: Mapping[Path, bytes], train: Mapping[Path, bytes]) -> list[tuple[Path, Path]]:
    """Pair held-out images with the training image whose outline is nearest, if that is within `ALIKE` bits."""
    if not train:
        return []
    places, hashes, found = list(train), _words(train.values()), []
    for path, (low, high) in zip(held_out, _words(held_out.values()), strict=True):
        bits: NDArray[np.uint8] = np.bitwise_count(hashes[:, 0] ^ low) + np.bitwise_count(hashes[:, 1] ^ high)
        if bits[best := int(bits.argmin())] <= ALIKE:
            found.append((path, places[best]))
    return found


def _words(outlines: Iterable[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(outlines), np.uint64).reshape(-1, 2)


def _left_out_warnings(left_out: Mapping[str, str]) -> Iterable[str]:
    for reason, names in by_reason(left_out).items():
        if reason != OTHER:
            yield f"{_several(len(names), 'file is', 'files are')} left out, because each {reason}: {_examples(names)}"


def _equal_groups(images: Mapping[Path, ImageFacts]) -> list[list[Path]]:
    """Group images of the same content; images without an equal are in no group."""
    groups = defaultdict(list)
    for path, facts in images.items():
        groups[facts.content].append(path)
    return [group for group in groups.values() if len(group) > 1]


def _shortened_names(paths: Sequence[Path]) -> Callable[[Path], str]:
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return lambda path: os.path.relpath(path, root)


def _of_pairs(pairs: Sequence[tuple[Path, Path]], one: str, many: str, what: str, name: Callable[[Path], str]) -> str:
    shown = _examples([f"{name(first)} and {name(second)}" for first, second in pairs])
    return f"{_several(len(pairs), one, many)} {what}: {shown}"


def _several(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")

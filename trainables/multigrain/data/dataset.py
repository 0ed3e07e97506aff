"""Data set in memory: paths of images with their classes and instances, and a copy-detection set."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class CopySet:
    """A copy-detection set: the original of each query is one image of the database."""

    database: tuple[Path, ...]
    """Originals first, then distractors."""
    queries: tuple[Path, ...]
    truth: tuple[int, ...]
    """Index of each query's original in `database`."""


@dataclass(frozen=True)
class Dataset:
    """Images for training and validation; a label is an index into `classes`."""

    classes: tuple[str, ...]
    train: tuple[Path, ...]
    train_labels: tuple[int, ...]
    val: tuple[Path, ...]
    val_labels: tuple[int, ...]
    copies: CopySet | None
    instances: tuple[int, ...] = ()
    """Index of the first image in `train` that shows the same as each image; its own index by default."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Names of what a folder holds besides, with the reason why it is left out: see `listing.Listing`."""
    litter: int = 0
    """Number of hidden files and folders there, and of those that systems leave behind."""

    def __post_init__(self) -> None:
        if not self.instances:
            object.__setattr__(self, "instances", tuple(range(len(self.train))))

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files, each once."""
        copies = (*self.copies.database, *self.copies.queries) if self.copies else ()
        return tuple(dict.fromkeys((*self.train, *self.val, *copies)))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that can be computed on these images."""
        pairs = len(set(self.val_labels)) < len(self.val_labels)  # some held-out image has another of its class
        names = ("top1", *(("class_map",) if pairs else ()))
        return (*names, "copy_map", "mean_top1_copy_map") if self.copies else names


def first_of_each_class(dataset: Dataset, count: int) -> list[int]:
    """Return the indices of the first `count` training images of each class, in the order of their names."""
    of_class: dict[int, list[int]] = {}
    for index in sorted(range(len(dataset.train)), key=lambda index: str(dataset.train[index])):
        of_class.setdefault(dataset.train_labels[index], []).append(index)
    return [index for label in sorted(of_class) for index in of_class[label][:count]]

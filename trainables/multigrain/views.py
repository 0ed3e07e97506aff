"""Files -> tensors: augmented views for training, plain crops for evaluation."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from multigrain.augment import TrainTransform, evaluation_crop


class Views(NamedTuple):
    """One rank's batch."""

    images: Tensor
    """(B, 3, S, S) float in [0, 1]."""
    labels: Tensor
    """(B,) class numbers."""
    instances: Tensor
    """(B,) numbers of the images that the views show."""


def decode(file: Path | BinaryIO) -> Tensor:
    """An image file as RGB, (3, H, W) uint8.

    Transparency is dropped, 16-bit grey keeps its upper eight bits, an orientation tag is not followed.
    """
    with Image.open(file) as image:
        if image.mode.startswith("I"):
            return torch.from_numpy((np.asarray(image) >> 8).astype(np.uint8)).expand(3, -1, -1)
        if "transparency" in image.info:
            return pil_to_tensor(image.convert("RGBA").convert("RGB"))
        return pil_to_tensor(image.convert("RGB"))


class TrainViews(Dataset[Views]):
    """Augmented views of a list of images, fetched by whole batches; an image is decoded once for all its copies.

    The draw of a view depends on (seed, epoch, image, copy) alone: not on the order of the batches, the
    number of loading processes, or what was drawn before.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], transform: TrainTransform, seed: int) -> None:
        self.paths, self.labels, self.transform, self.seed = paths, labels, transform, seed
        self.epoch = 0

    def __getitems__(self, indices: list[int]) -> Views:
        images = []
        with torch.random.fork_rng(devices=[]):
            for index, copies in groupby(indices):
                image = decode(self.paths[index])
                for copy, _ in enumerate(copies):
                    torch.default_generator.manual_seed(hash((self.seed, self.epoch, index, copy)) % 2**63)
                    images.append(self.transform(image))
        labels = torch.tensor([self.labels[index] for index in indices])
        return Views(torch.stack(images), labels, torch.tensor(indices))


def whole(batch: Any) -> Any:
    """The collate function of batches that come as one."""
    return batch


class _EvaluationImages(Dataset[Tensor]):
    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return evaluation_crop(decode(self.paths[index]), self.size)


def evaluation_batches(paths: Sequence[Path], size: int, batch_size: int = 256) -> DataLoader[Tensor]:
    """(B, 3, size, size) float batches of the files, in order."""
    return DataLoader(_EvaluationImages(paths, size), batch_size)

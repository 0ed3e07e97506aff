"""Loading of image files as tensors: batches of augmented views for training, and of whole images for evaluation."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torchvision.io  # noqa: F401 - registers the operator below
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from multigrain.config.training import AugmentSettings
from multigrain.data import decoding
from multigrain.data.decoding import ImageError
from multigrain.data.picture import Picture
from multigrain.data.transforms import EvaluationTransform, TrainTransform, evaluation_pixels, rect_shape
from multigrain.errors import DataError

# Takes half the time of Pillow. Its public wrapper is deprecated; if the operator is removed, Pillow decodes all files.
_decode_jpeg = getattr(torch.ops.image, "decode_jpeg", None)
_RGB = 3  # in torchvision.io.ImageReadMode

BATCH_PIXELS = 64 * 224 * 224
"""Largest number of pixels in an evaluation batch of several images."""

Source = Picture | Path
"""A part of a file, or a whole file."""


class Views(NamedTuple):
    """Training batch of one rank."""

    images: Tensor
    """(B, 3, S, S) uint8."""
    colour: Tensor
    """(B, 11) float, parameters of `transforms.colour`, which is still to be applied."""
    labels: Tensor
    """(B,) labels."""
    indices: Tensor
    """(B,) indices of the images in the training set."""


def decode(file: Path | BinaryIO, upright: bool = True) -> Tensor:
    """Decode an image file as RGB, (3, H, W) uint8, as `decoding.pixels` does.

    Args:
        file: a path, or an open file.
        upright: whether the image is turned as its EXIF orientation says, else it is as stored.
    Raises:
        OSError, SyntaxError, ValueError: the file is no image that can be decoded; `decoding.fault` words the reason.
    """
    content = decoding.read_file(file)
    with decoding.opened(content) as image:
        if _decode_jpeg and image.format in {"JPEG", "MPO"} and image.mode in {"RGB", "L"}:
            orientation = decoding.orientation(image, upright)
            try:
                decoded = _decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), _RGB)
            except RuntimeError:
                pass  # Pillow decodes some of these files, and has better messages for the others
            else:
                return decoded if orientation == 1 else _planes(decoding.oriented(_interleaved(decoded), orientation))
        return _planes(decoding.pixels(image, upright))


def _planes(image: decoding.Pixels) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def _interleaved(image: Tensor) -> decoding.Pixels:
    return image.permute(1, 2, 0).numpy()


class TrainViews(Dataset[Views]):
    """Augmented views of a list of images, fetched in whole batches; an image is decoded once for all its copies.

    The random numbers of a view depend on (seed, epoch, image, copy) alone: not on the order of the batches, the number
    of loading processes, or earlier views.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[int], settings: AugmentSettings, size: int, seed: int
    ) -> None:
        # One block of memory: every loading process would copy a million objects, page by page.
        self._paths, self._labels = np.array([os.fsencode(path) for path in paths]), torch.tensor(labels)
        self._transform, self._size, self._seed = TrainTransform(settings, size), size, seed
        # In shared memory, because loading processes live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Select the random numbers of all later batches, in all loading processes."""
        self._epoch.fill_(epoch)

    def __getitems__(self, indices: list[int]) -> Views:
        images = torch.empty(len(indices), 3, self._size, self._size, dtype=torch.uint8)
        colours: list[Tensor] = []
        epoch = int(self._epoch)
        with torch.random.fork_rng(devices=[]):
            for index, copies in groupby(indices):
                image = read(Path(os.fsdecode(self._paths[index])))
                for copy, _ in enumerate(copies):
                    torch.default_generator.manual_seed(hash((self._seed, epoch, index, copy)) % 2**63)
                    images[len(colours)], parameters = self._transform(image)
                    colours.append(parameters)
        positions = torch.tensor(indices)
        return Views(images, torch.stack(colours), self._labels[positions], positions)


def _whole(batch: Any) -> Any:
    """Return a batch as it is: the collate function of a data set that fetches whole batches."""
    return batch


def training_batches(
    views: TrainViews, sampler: Sampler[list[int]] | Sequence[list[int]], loaders: int, pin: bool
) -> DataLoader[Views]:
    """Return a loader of the sampler's batches; the views do not depend on the number of loading processes.

    Args:
        views: the training set.
        sampler: gives the image indices of each batch.
        loaders: number of processes that load ahead, with one thread each, for all epochs; 0 loads in this process.
        pin: whether batches are in pinned memory, from which a GPU copies while it computes.
    """
    return DataLoader(
        views,
        batch_sampler=sampler,
        num_workers=loaders,
        collate_fn=_whole,
        pin_memory=pin,
        persistent_workers=loaders > 0,
        generator=torch.Generator(),  # otherwise the loader would draw from the global one
    )


@contextmanager
def readable(picture: Source) -> Iterator[None]:
    """Turn an error in reading a picture into a DataError that names its file."""
    try:
        yield
    except Exception as error:  # Pillow raises many types, SyntaxError among them
        path = picture if isinstance(picture, Path) else picture.path
        fault = decoding.fault(error)
        raise DataError([f"every image must be usable, but {path} {fault}; repair or remove it"]) from error


def _box(picture: Picture, height: int, width: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the crop, in whole pixels within the file."""
    if picture.box is None:
        return 0, 0, width, height
    x1, y1, x2, y2 = map(round, picture.box)
    left, top, right, bottom = max(0, x1), max(0, y1), min(width, x2), min(height, y2)
    if left >= right or top >= bottom:
        raise ImageError(f"must have a pixel in its box, but {picture.box} holds none of {width} x {height}")
    return left, top, right, bottom


def read(picture: Source) -> Tensor:
    """Read a file, or a picture with its box and turn: (3, H, W) uint8. Raises DataError if that fails."""
    with readable(picture):
        if isinstance(picture, Path):
            return decode(picture)
        image = decode(picture.path, picture.upright)
        left, top, right, bottom = _box(picture, *image.shape[1:])
        return torch.rot90(image[:, top:bottom, left:right], -picture.turn // 90, (1, 2))


def _shape(picture: Source) -> tuple[int, int]:
    """Return height and width of the result of `read`, from the header of the file."""
    picture = Picture(picture) if isinstance(picture, Path) else picture
    with readable(picture), decoding.opened(picture.path) as image:
        left, top, right, bottom = _box(picture, *decoding.shape(image, picture.upright))
        shape = bottom - top, right - left
        return shape[::-1] if picture.turn % 180 else shape


class _EvaluationImages(Dataset[tuple[list[int], Tensor | list[str]]]):
    def __init__(self, pictures: Sequence[Source], transform: EvaluationTransform, size: int) -> None:
        self.pictures, self.transform, self.size = pictures, transform, size

    def __getitems__(self, positions: list[int]) -> tuple[list[int], Tensor | list[str]]:
        try:
            images = [self._shown(self.pictures[position]) for position in positions]
        except DataError as error:
            return positions, error.problems  # raised here, it would come with the traceback of a loading process
        return positions, torch.stack(images)

    def _shown(self, picture: Source) -> Tensor:
        image = read(picture)
        with readable(picture):
            return evaluation_pixels(image, self.transform, self.size)


def _of_one_shape(
    pictures: Sequence[Source], block: Sequence[int], transform: EvaluationTransform, size: int, most: int
) -> Iterator[list[int]]:
    """Split a block into batches of at most `most` positions whose images have one shape for the network."""
    found = defaultdict(list)
    for position in block:
        shape = rect_shape(*_shape(pictures[position]), size) if transform == "rect" else (size, size)
        found[shape].append(position)
    for (height, width), positions in found.items():
        step = max(1, min(most, BATCH_PIXELS // (height * width)))
        yield from (positions[start : start + step] for start in range(0, len(positions), step))


def evaluation_batches(
    pictures: Sequence[Source],
    transform: EvaluationTransform,
    size: int,
    batch_size: int = 256,
    loaders: int = 0,
    blocks: Sequence[Sequence[int]] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield every picture once, in batches of one shape: positions in `pictures`, and (B, 3, h, w) uint8.

    Args:
        pictures: files or parts of files.
        transform: see `transforms.evaluation_pixels`.
        size: see `transforms.evaluation_pixels`.
        batch_size: largest number of images in a batch; large images come in smaller batches.
        loaders: number of processes that load ahead.
        blocks: positions that are loaded, block after block; one block of all positions by default.
    Raises:
        DataError: a picture cannot be read.
    """
    blocks = [range(len(pictures))] if blocks is None else blocks
    problems: list[str] = []

    def batches() -> Iterator[list[int]]:
        for block in blocks:
            for batch in _of_one_shape(pictures, block, transform, size, batch_size):
                if problems:  # loading processes finish the batches they have begun, and load no others
                    return
                yield batch

    images = _EvaluationImages(pictures, transform, size)
    loader: DataLoader[Any] = DataLoader(
        images, batch_sampler=batches(), num_workers=loaders, collate_fn=_whole, generator=torch.Generator()
    )
    for positions, shown in loader:
        if not isinstance(shown, Tensor):
            problems += shown
        elif not problems:
            yield positions, shown
    if problems:
        raise DataError(problems)

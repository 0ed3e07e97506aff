"""Sampler of batches with repeated augmentation, for any number of ranks."""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, turn: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch, turn)).permutation(size)


class RepeatedAugmentationBatches(Sampler[list[int]]):
    """Batches of image indices in which every image comes `repeats` times in a row.

    All copies of an image are in the batch of one rank, so every anchor has its positives there at any world size.
    The images of one step are all different, over all ranks. They come from random permutations of the set, one after
    another; the rest of a permutation that does not fill a step is dropped. All steps are full. The order depends on
    (seed, epoch) alone. The batches of all ranks, concatenated, are the batch of a single process.

    Samplers that spread the copies over the ranks leave anchors without a positive, and samplers that round the epoch
    down leave small sets without a batch; neither can happen here.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        repeats: int = 3,
        length_factor: float = 2.0,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        """
        Args:
            num_images: number of images in the set, at least `world_size`.
            batch_size: views in one step over all ranks, a multiple of repeats x world_size. For a smaller set, a step
                shrinks to the whole set, without the images that the ranks cannot share evenly.
            repeats: m, number of copies of an image in its batch.
            length_factor: number of views in an epoch as a multiple of `num_images`; rounded up to whole steps.
            rank: rank of this process, in [0, world_size).
            world_size: number of ranks.
            seed: seed of the order.
        Raises:
            ValueError: one of these conditions does not hold.
        """
        if min(batch_size, repeats, world_size) < 1 or batch_size % (repeats * world_size):
            raise ValueError(
                "batch_size must be a positive multiple of repeats x world_size, "
                f"got {batch_size} and {repeats} x {world_size}"
            )
        if num_images < world_size:
            raise ValueError(f"every rank needs an image, got {num_images} images for {world_size} ranks")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        self.num_images, self.repeats, self.rank, self.seed = num_images, repeats, rank, seed
        self.groups = min(batch_size // repeats, num_images) // world_size
        """Number of different images in the batch of a rank."""
        self.images_per_step = self.groups * world_size
        self.steps = max(1, math.ceil(math.floor(num_images * length_factor) / (self.images_per_step * repeats)))
        self.epoch = self.step = 0

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """Select the order of the next iteration, and its first step."""
        self.epoch, self.step = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Return the position; with the constructor's other arguments, it determines the rest of the epoch."""
        return {"seed": self.seed, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position; the next iteration continues at its step."""
        self.seed, self.epoch, self.step = state["seed"], state["epoch"], state["step"]

    def images(self, step: int) -> NDArray[np.int64]:
        """Return the different images of one step of the epoch, for all ranks, rank by rank."""
        turn, position = divmod(step, self.num_images // self.images_per_step)
        order = _permutation(self.seed, self.epoch, turn, self.num_images)
        return order[position * self.images_per_step : (position + 1) * self.images_per_step]

    def __iter__(self) -> Iterator[list[int]]:
        mine = slice(self.rank * self.groups, (self.rank + 1) * self.groups)
        while self.step < self.steps:
            images = self.images(self.step)[mine]
            self.step += 1
            yield images.repeat(self.repeats).tolist()
        self.step = 0

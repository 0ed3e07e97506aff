"""Repeated-augmentation batches: which images, with their copies, on which rank."""

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
    """Batches of image indices in which every image stands `repeats` times in a row.

    A rank's batch holds whole groups, so every anchor has its positives there at any world size; the
    images of one step are all different, over all ranks. Images are drawn from random permutations of
    the set, one after another; what does not fill a last step is left to the next permutation. All
    steps are full. The order depends on (seed, epoch) alone, and the step on nothing before it: the
    ranks' batches, one behind the other, are the batch that one process would have.

    Samplers that spread the copies over the ranks leave anchors without a positive, and those that
    round the epoch down leave small sets without a batch; neither can happen here.
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
            num_images: images in the set, at least `world_size`.
            batch_size: views in one step over all ranks, a multiple of repeats x world_size. Where the set
                is smaller than that, the step shrinks to the whole set, less what the ranks cannot share evenly.
            repeats: m, copies of an image in its batch.
            length_factor: views in an epoch as a multiple of `num_images`; rounded up to whole steps.
            rank: in [0, world_size).
            world_size: number of ranks.
            seed: of the order.
        Raises:
            ValueError: if one of these does not hold.
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
        """Different images in one rank's batch."""
        self.images_per_step = self.groups * world_size
        self.steps = max(1, math.ceil(math.floor(num_images * length_factor) / (self.images_per_step * repeats)))
        self.epoch = self.step = 0

    def __len__(self) -> int:
        """Steps in one epoch."""
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, which begins at its first step."""
        self.epoch, self.step = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """The position: what decides the rest of the epoch, besides the constructor's other arguments."""
        return {"seed": self.seed, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`: the next iteration goes on at the step."""
        self.seed, self.epoch, self.step = state["seed"], state["epoch"], state["step"]

    def images(self, step: int) -> NDArray[np.int64]:
        """The different images of one step of the epoch, of all ranks, rank by rank."""
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

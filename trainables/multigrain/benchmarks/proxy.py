"""Choice of p*, the pooling exponent for images of another size, from training images only.

The paper chooses p* on a proxy task: finding augmented copies of 2,000 training images among each other. It does not
give the exact score; this module uses the mean of copy mAP and top-1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from multigrain.config.training import AugmentSettings
from multigrain.data.dataset import Dataset, first_of_each_class
from multigrain.data.loading import BATCH_PIXELS, TrainViews, training_batches
from multigrain.data.transforms import colour
from multigrain.evaluation.embed import descriptors, pooled
from multigrain.models.multigrain import MultiGrain
from multigrain.retrieval.metrics import same_label
from multigrain.retrieval.ranking import mean_average_precision


class Score(NamedTuple):
    """Scores of an exponent, in [0, 1]; larger is better."""

    copy_map: float
    """mAP of finding the other copies of a copy's image among all copies."""
    top1: float
    """Share of the copies whose class is right."""

    @property
    def mean(self) -> float:
        """Score by which p* is chosen: the mean of both, since one exponent serves both tasks."""
        return (self.copy_map + self.top1) / 2


def best(scores: dict[float, Score]) -> float:
    """Return p*: the exponent with the largest mean score, the smallest one of equals."""
    return max(sorted(scores), key=lambda p: scores[p].mean)


@torch.no_grad()
def score(
    network: MultiGrain,
    dataset: Dataset,
    settings: AugmentSettings,
    size: int,
    exponents: Sequence[float],
    device: torch.device,
    loaders: int = 0,
    images_per_class: int = 2,
    copies: int = 5,
    seed: int = 0,
) -> dict[float, Score]:
    """Compute the scores of exponents for images of one size.

    Every copy is a query for the other copies of its image. Each copy passes through the trunk once.

    Args:
        network: on `device`; it is left in evaluation mode.
        settings: the augmentation that makes the copies.
        size: s*, the side of the square copies, in pixels.
        exponents: at least 1.
        loaders: processes that make the copies; with 0, this process makes them.
        images_per_class: number of training images of each class, the first ones by name [P: 2].
        copies: number of copies of each image, at least 2 [P: 5].
        seed: seed of the augmentation.
    """
    network.eval()
    chosen = first_of_each_class(dataset, images_per_class)
    labels = [dataset.train_labels[index] for index in chosen]
    views = TrainViews([dataset.train[index] for index in chosen], labels, settings, size, seed)
    step = max(1, BATCH_PIXELS // (copies * size * size))
    numbers = [number for number in range(len(chosen)) for _ in range(copies)]
    batches = [numbers[start : start + step * copies] for start in range(0, len(numbers), step * copies)]
    exponents = tuple(map(float, exponents))
    embeddings = np.empty((len(exponents), len(numbers), network.classifier.in_features), "f4")
    right = np.zeros(len(exponents))
    done = 0
    for batch in training_batches(views, batches, loaders, pin=False):
        found = pooled(network, colour(batch.images.to(device), batch.colour.to(device)), exponents)
        right += (network.head(found).logits.argmax(dim=-1) == batch.labels.to(device)).sum(dim=-1).cpu().numpy()
        embeddings[:, done : done + len(batch.labels)] = found.cpu().numpy()
        done += len(batch.labels)
    truth, scores = same_label(np.array(numbers)), {}
    for p, pooled_by_p, correct in zip(exponents, embeddings, right.tolist(), strict=True):
        vectors = descriptors(pooled_by_p, None)
        scores[p] = Score(mean_average_precision(vectors, vectors, truth), correct / len(numbers))
    return scores

"""A predictor for many images at once: decoded in threads, shown to the network in batches of one shape."""

import io
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from multigrain.augment import EvaluationTransform, evaluation_pixels, scale
from multigrain.predict import Predictor
from multigrain.views import BATCH_PIXELS, decode

BATCH = 64
"""Most images in a batch."""


class InBatches:
    """Calls a predictor's network on tables of images.

    Input: a column `image` of bytes, paths or arrays (H, W, 3) uint8. Output, row for row: `embedding` (floats of unit
    norm), `class_id`, `class_name`, `score` (probability in [0, 1]), and `error`, which says why a row is empty: its
    image is none.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.of = predictor

    @torch.no_grad()
    def __call__(self, table: pd.DataFrame) -> pd.DataFrame:
        rows: list[dict[str, Any]] = [{}] * len(table)
        for positions, shown in shapes(table["image"], self.of.transform, self.of.size):
            if isinstance(shown, str):
                rows[positions[0]] = {"error": shown}
                continue
            output = self.of.network(scale(shown))
            scores, classes = output.logits.softmax(dim=1).max(dim=1)
            white = self.of.whitening
            embeddings = (white.transform(output.embedding) if white else output.descriptor).tolist()
            for place, embedding, score, index in zip(positions, embeddings, scores, classes, strict=True):
                rows[place] = {
                    "embedding": embedding,
                    "class_id": int(index),
                    "class_name": self.of.classes[int(index)],
                    "score": float(score),
                }
        columns = ("embedding", "class_id", "class_name", "score", "error")
        return pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=object) for name in columns})


def shapes(
    images: Iterable[Any], transform: EvaluationTransform, size: int
) -> Iterator[tuple[list[int], Tensor | str]]:
    """Every image once: positions and (B, 3, h, w) uint8 of one shape, or one position and why it is no image.

    Args:
        images: bytes, paths or arrays (H, W, 3) uint8; threads decode them ahead.
        transform, size: as in `augment.evaluation_pixels`.
    """

    def read(image: Any) -> Tensor | str:
        try:
            return evaluation_pixels(_pixels(image), transform, size)
        except UnidentifiedImageError:  # its text names an object of ours
            return "is not an image, or its first bytes are damaged"
        except Exception as error:  # Pillow raises many types, SyntaxError among them
            return f"cannot be read as an image ({str(error) or type(error).__name__})"

    waiting: dict[torch.Size, list[tuple[int, Tensor]]] = defaultdict(list)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # as many as this process may use
        for position, shown in enumerate(threads.map(read, images)):
            if isinstance(shown, str):
                yield [position], shown
                continue
            group = waiting[shown.shape]
            group.append((position, shown))
            if len(group) >= min(BATCH, BATCH_PIXELS // (shown.shape[1] * shown.shape[2])):
                yield _stacked(waiting.pop(shown.shape))
        yield from map(_stacked, waiting.values())


def _stacked(group: Sequence[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    return [position for position, _ in group], torch.stack([shown for _, shown in group])


def _pixels(image: Any) -> Tensor:
    """(3, H, W) uint8."""
    if isinstance(image, bytes):
        return decode(io.BytesIO(image))
    if isinstance(image, str | os.PathLike):
        return decode(Path(image))
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"an array must be (H, W, 3) of uint8, got {array.shape} of {array.dtype}")
    return torch.from_numpy(array.copy()).permute(2, 0, 1)

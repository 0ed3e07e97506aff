"""A registered model that embeds images: the one room that knows what its answers are called."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grainmill import trainable as catalog
from grainmill.errors import CorpusError
from grainmill.registry import integrity, models

SCHEME = "models:/"


class Answer(NamedTuple):
    """What a model says of one image."""

    embedding: NDArray[np.float32] | None
    """(D,), of unit norm; None with an error, as all that follows."""
    class_id: int | None
    class_name: str | None
    score: float | None
    """Probability of the class, in [0, 1]."""
    error: str | None
    """Why the image is none."""


class ModelIdentity(NamedTuple):
    """Which model made embeddings: only those of equal digest can be compared."""

    model: str
    """`models:/name/version`."""
    digest: str
    """SHA-256 of the manifest of its files."""
    dimension: int
    trainable: str


class Embedder:
    """Calls one version of a registered model on the contents of image files."""

    def __init__(self, tracking_uri: str, model: str) -> None:
        """
        Args:
            tracking_uri: MLflow's.
            model: `models:/name@alias` or `models:/name/version`.
        Raises:
            CorpusError: the model does not embed images.
            TrackingError: it is not registered, or MLflow does not answer.
        """
        if not model.startswith(SCHEME):
            rule = "a model must be registered, and named as models:/name@alias or models:/name/version"
            raise CorpusError(f"{rule}, got {model}; `grainmill train` and `grainmill tune` register theirs")
        stored = models.fetch(tracking_uri, model)
        self._predict = catalog.find(stored.trainable).load(stored.folder)
        try:
            first = self(list(stored.example["image"])[:1])[0]
        except KeyError as error:
            raise CorpusError(f"a model must embed images, but {model} knows no {error}; name another") from error
        assert first.embedding is not None, "the example is an image"
        digest = integrity.manifest_digest(stored.portable)
        self.identity = ModelIdentity(stored.version.uri, digest, len(first.embedding), stored.trainable)

    def __call__(self, images: Sequence[bytes]) -> list[Answer]:
        """One answer for each image, in order."""
        rows = self._predict(pd.DataFrame({"image": pd.Series(images, dtype=object)})).to_dict("records")
        return [_answer(row) for row in rows]


def _answer(row: dict[str, Any]) -> Answer:
    if row["error"] is not None:
        return Answer(None, None, None, None, row["error"])
    embedding = np.asarray(row["embedding"], np.float32)
    return Answer(embedding, int(row["class_id"]), row["class_name"], float(row["score"]), None)

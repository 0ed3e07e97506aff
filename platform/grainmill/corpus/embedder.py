"""Embedder: a registered model that embeds images. Only this module knows the columns of the model's tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grainmill import trainable as catalog
from grainmill.errors import CorpusError
from grainmill.registry import integrity, models


class Answer(NamedTuple):
    """A model's answer to one image; either `error` or all other fields are None."""

    embedding: NDArray[np.float32] | None
    """(D,), of unit norm."""
    class_id: int | None
    class_name: str | None
    score: float | None
    """Probability of the class, in [0, 1]."""
    error: str | None
    """Reason why there is no embedding, such as "is not an image"."""


class ModelIdentity(NamedTuple):
    """Model that made embeddings; embeddings can be compared if their digests are equal."""

    model: str
    """URI of the version, `models:/name/version`."""
    digest: str
    """SHA-256 of the manifest of the model's files."""
    dimension: int
    trainable: str


class Embedder:
    """Applies one version of a registered model to the contents of image files."""

    def __init__(self, tracking_uri: str, model: str) -> None:
        """
        Args:
            tracking_uri: address of MLflow.
            model: `models:/name@alias` or `models:/name/version`.
        Raises:
            CorpusError: the model does not embed images.
            TrackingError: the model is not registered, or MLflow does not answer.
        """
        if not model.startswith(models.SCHEME):
            rule = "a model must be registered, and named as models:/name@alias or models:/name/version"
            raise CorpusError(f"{rule}, got {model}; `grainmill train` and `grainmill tune` register theirs")
        with models.fetched(tracking_uri, model) as stored:
            self._predict = catalog.find(stored.trainable).load(stored.folder)
            digest = integrity.manifest_digest(stored.portable)
        try:
            first = self(list(stored.example["image"])[:1])[0]
        except KeyError as error:
            raise CorpusError(f"a model must embed images, but {model} knows no {error}; name another") from error
        assert first.embedding is not None, "the example is an image"
        self.identity = ModelIdentity(stored.version.uri, digest, len(first.embedding), stored.trainable)

    def __call__(self, contents: Sequence[bytes | str]) -> list[Answer]:
        """Embed files, in order; a text stands for a file that could not be read, and is the error of its answer."""
        images = [content for content in contents if isinstance(content, bytes)]
        table = pd.DataFrame({"image": pd.Series(images, dtype=object)})
        rows = iter(self._predict(table).to_dict("records") if images else ())
        return [_answer(next(rows) if isinstance(content, bytes) else {"error": content}) for content in contents]


def _answer(row: dict[str, Any]) -> Answer:
    if row["error"] is not None:
        return Answer(None, None, None, None, row["error"])
    embedding = np.asarray(row["embedding"], np.float32)
    return Answer(embedding, int(row["class_id"]), row["class_name"], float(row["score"]), None)

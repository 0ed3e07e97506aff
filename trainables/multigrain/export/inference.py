"""A trained network as it answers: at the setting that it serves, images in, embedding and class out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from multigrain.data.transforms import scale
from multigrain.export import standalone
from multigrain.models import checkpoint, served_setting
from multigrain.models.multigrain import MultiGrain, l2_normalise, network_of
from multigrain.models.pooling import GeM
from multigrain.models.whitening import Whitening


class Answers(nn.Module):
    """(B, 3, H, W) uint8, RGB -> embeddings (B, D) of unit norm, whitened if so served, and probabilities (B, K)."""

    def __init__(self, network: MultiGrain, whitening: Whitening | None = None) -> None:
        super().__init__()
        self.network, self.whitened = network, whitening is not None
        for name, tensor in (whitening.state_dict() if whitening else {}).items():
            self.register_buffer(name, tensor)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.network.embed(scale(images))
        whitening = Whitening.from_state(dict(self.named_buffers(recurse=False))) if self.whitened else None
        embedding = whitening.transform(pooled) if whitening else l2_normalise(pooled)
        return embedding, self.network.classifier(pooled).softmax(dim=1)


class Served(NamedTuple):
    """A network at the setting that it serves."""

    answers: Answers
    """In evaluation mode, on the CPU."""
    trunk: str
    classes: Sequence[str]
    """In the order of the probabilities."""
    transform: str
    """`crop` or `rect`, as in `augment.evaluation_pixels`."""
    size: int
    """s*, in pixels."""
    p: float
    """p*, the exponent."""
    dimension: int
    """D."""

    def facts(self) -> dict[str, Any]:
        """What a reader of the exported model needs; an infinite exponent as the text `inf`."""
        told = self._asdict() | {"classes": list(self.classes), "p": self.p if self.p < float("inf") else "inf"}
        return {name: value for name, value in told.items() if name != "answers"} | {"whitened": self.answers.whitened}


def read(folder: Path) -> Served:
    """The newest intact checkpoint below a training folder.

    A model that an evaluation made to serve a setting answers at that one: images of that size, whole (`rect`)
    unless it is the network's own, its exponent in place of the network's, descriptors whitened if they are to be.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the setting to serve is damaged.
    """
    setting = served_setting.read(folder)
    saved = checkpoint.latest(folder)
    if saved is None:
        raise FileNotFoundError(f"a model needs a checkpoint, but {folder} holds none that is intact")
    network, spec = network_of(saved)
    own, transform = spec.evaluation_size, spec.evaluation.transform
    if setting is None:
        p = network.pool.p
        learnt = max(1.0, p.item()) if isinstance(p, Tensor) else p  # as it counts
        setting = served_setting.ServedSetting(own, learnt, None)
    network.pool = GeM(setting.p)
    return Served(
        Answers(network, setting.whitening).eval(),
        spec.model.trunk,
        tuple(saved.state["classes"]),
        transform if setting.size == own else "rect",
        setting.size,
        setting.p,
        setting.whitening.projection.shape[1] if setting.whitening else network.classifier.in_features,
    )


def load(folder: Path) -> standalone.Model:
    """The model in a training folder, as `read` finds it, without an export."""
    served = read(folder)

    @torch.no_grad()
    def run(images: np.ndarray[Any, Any]) -> Any:
        return tuple(output.numpy() for output in served.answers(torch.from_numpy(images)))

    return standalone.Model(served.facts(), run, standalone.scale_by_torch)

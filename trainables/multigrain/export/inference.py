"""A trained network at the setting that it serves: images in, embeddings and classes out."""

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
    """Module from (B, 3, H, W) uint8 to embeddings (B, D) of unit norm, possibly whitened, and probabilities (B, K)."""

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
    """Module in evaluation mode, on the CPU."""
    facts: dict[str, Any]
    """Facts for `standalone.Model`: `trunk`, `classes` in the order of the probabilities, `transform` (`crop` or
    `rect`), `size` (s*, in pixels), `p` (p*; infinity as the text `inf`), `dimension` (D, of an embedding), `whitened`,
    `orientation` (`exif` or `stored`: whether images are turned as their EXIF orientation says).
    """


def read(folder: Path) -> Served:
    """Read the newest intact checkpoint below a training folder.

    A model that an evaluation made serves another setting: images of that size, shown whole (`rect`) unless it is the
    network's own size, pooled with that exponent, and whitened if the setting says so.

    Raises:
        FileNotFoundError: there is no intact checkpoint.
        ValueError: the file of the served setting is damaged.
    """
    setting = served_setting.read(folder)
    saved = checkpoint.latest(folder)
    if saved is None:
        raise FileNotFoundError(f"a model needs a checkpoint, but {folder} holds none that is intact")
    network, spec = network_of(saved)
    own, transform = spec.evaluation_size, spec.evaluation.transform
    if setting is None:
        p = network.pool.p
        learnt = max(1.0, p.item()) if isinstance(p, Tensor) else p  # a learnt p below 1 counts as 1
        setting = served_setting.ServedSetting(own, learnt, None)
    network.pool = GeM(setting.p)
    facts = {
        "trunk": spec.model.trunk,
        "classes": list(saved.state["classes"]),
        "transform": transform if setting.size == own else "rect",
        "size": setting.size,
        "p": setting.p if setting.p < float("inf") else "inf",
        "dimension": setting.whitening.projection.shape[1] if setting.whitening else network.classifier.in_features,
        "whitened": setting.whitening is not None,
        "orientation": saved.state.get("orientation", "stored"),  # the first versions did not turn images
    }
    return Served(Answers(network, setting.whitening).eval(), facts)


def load(folder: Path) -> standalone.Model:
    """Load the model of a training folder, as `read` finds it, or of an export, by its `checkpoint`.

    An export answers by ONNX Runtime, which takes fewer and shorter steps than PyTorch on a CPU.
    """
    if (folder.parent / standalone.NETWORK).is_file():
        model = standalone.load(folder.parent, "onnx")
        return standalone.Model(model.facts, model.run, standalone.scale_by_torch)
    served = read(folder)

    @torch.no_grad()
    def run(images: np.ndarray[Any, Any]) -> Any:
        return tuple(output.numpy() for output in served.answers(torch.from_numpy(images)))

    return standalone.Model(served.facts, run, standalone.scale_by_torch)

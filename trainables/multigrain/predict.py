"""A trained network, as its users call it: image bytes in, descriptor and class out."""

import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from multigrain import checkpoint, serving
from multigrain.augment import EvaluationTransform, evaluation_view
from multigrain.model import MultiGrain
from multigrain.pooling import GeM
from multigrain.spec import MultiGrainSpec
from multigrain.views import decode
from multigrain.whitening import Whitening


class Predictor:
    """Calls a network on tables of encoded images.

    Input: a column `image` of bytes, any format that Pillow reads, any size. Output, row for row:
    `descriptor` (C floats of unit norm; D of a whitening), `class_id`, `class_name`, `score` (probability in [0, 1]).
    """

    def __init__(
        self,
        network: MultiGrain,
        classes: Sequence[str],
        transform: EvaluationTransform,
        size: int,
        whitening: Whitening | None = None,
    ) -> None:
        """
        Args:
            classes: names, in the order of the logits.
            transform, size: as in `augment.evaluation_view`.
            whitening: of the descriptors; none by default.
        """
        self.network, self.classes, self.transform, self.size = network.eval(), tuple(classes), transform, size
        self.whitening = whitening

    @torch.no_grad()
    def __call__(self, table: pd.DataFrame) -> pd.DataFrame:
        columns: dict[str, list[object]] = {"descriptor": [], "class_id": [], "class_name": [], "score": []}
        for content in table["image"]:
            image = evaluation_view(decode(io.BytesIO(content)), self.transform, self.size)
            output = self.network(image[None])
            score, index = output.logits[0].softmax(dim=0).max(dim=0)
            white = self.whitening
            descriptor = white.transform(output.embedding) if white else output.descriptor
            columns["descriptor"].append(descriptor[0].tolist())
            columns["class_id"].append(int(index))
            columns["class_name"].append(self.classes[int(index)])
            columns["score"].append(float(score))
        return pd.DataFrame(columns)


def network_of(saved: checkpoint.Checkpoint) -> tuple[MultiGrain, MultiGrainSpec]:
    """The network of a checkpoint, with the averaged weights where it has them, and its settings."""
    spec = MultiGrainSpec.model_validate(saved.state["spec"])
    network = MultiGrain(spec.model.trunk, len(saved.state["classes"]), spec.model.p, spec.model.learn_p)
    network.load_state_dict(saved.part(checkpoint.AVERAGED) or saved.part(checkpoint.NETWORK))
    return network, spec


def load(folder: Path) -> Predictor:
    """The newest intact checkpoint below a training folder, on the CPU.

    A model that an evaluation made to serve a setting answers at that one: images of that size, whole (`rect`)
    unless it is the network's own, its exponent in place of the network's, descriptors whitened if they are to be.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the setting to serve is damaged.
    """
    served = serving.read(folder)
    saved = checkpoint.latest(folder)
    if saved is None:
        raise FileNotFoundError(f"a model needs a checkpoint, but {folder} holds none that is intact")
    network, spec = network_of(saved)
    classes, own = saved.state["classes"], spec.evaluation_size
    if served is None:
        return Predictor(network, classes, spec.evaluation.transform, own)
    network.pool = GeM(served.p)
    transform = spec.evaluation.transform if served.size == own else "rect"
    return Predictor(network, classes, transform, served.size, served.whitening)

"""A trained network, as its users call it: image bytes in, descriptor and class out."""

import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from multigrain import checkpoint
from multigrain.augment import evaluation_crop
from multigrain.model import MultiGrain
from multigrain.spec import MultiGrainSpec
from multigrain.views import decode


class Predictor:
    """Calls a network on tables of encoded images.

    Input: a column `image` of bytes, any format that Pillow reads, any size. Output, row for row:
    `descriptor` (C floats of unit norm), `class_id`, `class_name`, `score` (probability in [0, 1]).
    """

    def __init__(self, network: MultiGrain, classes: Sequence[str], size: int) -> None:
        self.network, self.classes, self.size = network.eval(), tuple(classes), size

    @torch.no_grad()
    def __call__(self, table: pd.DataFrame) -> pd.DataFrame:
        columns: dict[str, list[object]] = {"descriptor": [], "class_id": [], "class_name": [], "score": []}
        for content in table["image"]:
            crop = evaluation_crop(decode(io.BytesIO(content)), self.size)
            output = self.network(crop[None])
            score, index = output.logits[0].softmax(dim=0).max(dim=0)
            columns["descriptor"].append(output.descriptor[0].tolist())
            columns["class_id"].append(int(index))
            columns["class_name"].append(self.classes[int(index)])
            columns["score"].append(float(score))
        return pd.DataFrame(columns)


def load(folder: Path) -> Predictor:
    """The newest intact checkpoint below a training folder, on the CPU.

    Raises:
        FileNotFoundError: there is none.
    """
    saved = checkpoint.latest(folder)
    if saved is None:
        raise FileNotFoundError(f"a model needs a checkpoint, but {folder} holds none that is intact")
    spec = MultiGrainSpec.model_validate(saved.state["spec"])
    network = MultiGrain(spec.model.trunk, len(saved.state["classes"]), spec.model.p)
    prefix = "network."
    network.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in saved.model.items() if name.startswith(prefix)}
    )
    return Predictor(network, saved.state["classes"], spec.image_size)

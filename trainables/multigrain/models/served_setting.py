"""The setting that a model serves: image size, pooling exponent and whitening, next to its checkpoint.

`serving.safetensors` holds the whitening, if any, and size and exponent as metadata. `serving.json` holds its SHA-256,
because safetensors does not notice a flipped byte.
"""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file

from multigrain.models import checkpoint
from multigrain.models.whitening import Whitening

CONTENT, DIGEST = "serving.safetensors", "serving.json"


class ServedSetting(NamedTuple):
    """Setting at which a model computes its results."""

    size: int
    """s*, image size in pixels."""
    p: float
    """p*, pooling exponent."""
    whitening: Whitening | None


def write(folder: Path, saved: checkpoint.Checkpoint, setting: ServedSetting | None) -> None:
    """Write a model, without its optimizer, and the setting that it serves to a folder without a model."""
    checkpoint.save(folder, saved._replace(optimizer={}))
    if setting is None:
        return
    state = setting.whitening.state_dict() if setting.whitening else {}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / CONTENT, {"size": str(setting.size), "p": repr(float(setting.p))})
    (folder / DIGEST).write_text(json.dumps({"sha256": checkpoint.digest(folder / CONTENT)["sha256"]}))


def is_served(folder: Path) -> bool:
    """Return True if the model in a folder serves a setting of its own."""
    return (folder / CONTENT).exists() or (folder / DIGEST).exists()


def read(folder: Path) -> ServedSetting | None:
    """The setting that the model in a folder serves; None if the model has none of its own.

    Raises:
        ValueError: the files are damaged.
    """
    if not is_served(folder):
        return None
    try:
        recorded = json.loads((folder / DIGEST).read_text())
        intact = recorded == {"sha256": checkpoint.digest(folder / CONTENT)["sha256"]}
    except (OSError, ValueError):
        intact = False
    if not intact:
        raise ValueError(
            f"{CONTENT} must match {DIGEST}, but does not in {folder}; evaluate again with the same `serve`"
        )
    with safe_open(folder / CONTENT, framework="pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return ServedSetting(int(metadata["size"]), float(metadata["p"]), Whitening.from_state(state) if state else None)

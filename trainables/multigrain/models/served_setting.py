"""A model that serves one setting: a checkpoint, and beside it the size, the exponent and the whitening to use.

`serving.safetensors` holds the whitening, if there is one, and in its metadata size and exponent; `serving.json` has
its SHA-256: safetensors notices no flipped byte.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file

from multigrain.models import checkpoint
from multigrain.models.whitening import Whitening

CONTENT, SEAL = "serving.safetensors", "serving.json"


class ServedSetting(NamedTuple):
    """How a model answers."""

    size: int
    """s*, in pixels."""
    p: float
    """p*, the exponent."""
    whitening: Whitening | None


def write(folder: Path, saved: checkpoint.Checkpoint, serving: ServedSetting) -> None:
    """Write a model to a folder that holds none yet; it cannot be trained on."""
    checkpoint.save(folder, saved._replace(optimizer={}))
    state = serving.whitening.state_dict() if serving.whitening else {}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / CONTENT, {"size": str(serving.size), "p": repr(float(serving.p))})
    (folder / SEAL).write_text(json.dumps({"sha256": _digest(folder)}))


def copy(folder: Path, out: Path, saved: checkpoint.Checkpoint) -> None:
    """Write the model in a folder, of which `saved` is the checkpoint, to one that holds none yet."""
    checkpoint.save(out, saved._replace(optimizer={}))
    for name in (CONTENT, SEAL) if is_served(folder) else ():
        shutil.copyfile(folder / name, out / name)


def is_served(folder: Path) -> bool:
    """Whether the model in a folder serves a setting of its own."""
    return (folder / CONTENT).exists() or (folder / SEAL).exists()


def read(folder: Path) -> ServedSetting | None:
    """The setting that the model in a folder serves; None if it has none of its own.

    Raises:
        ValueError: the files are damaged.
    """
    if not is_served(folder):
        return None
    try:
        intact = json.loads((folder / SEAL).read_text()) == {"sha256": _digest(folder)}
    except (OSError, ValueError):
        intact = False
    if not intact:
        raise ValueError(f"{CONTENT} must match {SEAL}, but does not in {folder}; evaluate again with the same `serve`")
    with safe_open(folder / CONTENT, framework="pt") as file:
        told, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return ServedSetting(int(told["size"]), float(told["p"]), Whitening.from_state(state) if state else None)


def _digest(folder: Path) -> str:
    with (folder / CONTENT).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

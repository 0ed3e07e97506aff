"""Training state <-> directory: whole or absent, checked by hash, loaded without pickle.

`<folder>/epoch-0007/` holds `model.safetensors`, `optimizer.pt` (tensors and numbers only),
`state.json` and, written last, `MANIFEST.json` with the size and SHA-256 of each. Neither torch
nor safetensors notices a flipped byte, so a checkpoint that does not match its manifest is passed
over, with a warning, for the one before.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
FILES = {"model.safetensors", "optimizer.pt", "state.json"}
KEEP = 2
"""Checkpoints kept: the newest, and one to fall back to."""


class Checkpoint(NamedTuple):
    """What a run needs to go on, or a reader to use the model."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """JSON: `epoch`, `metrics`, `spec`, `classes`."""


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _epochs(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    found = [path for path in folder.glob("epoch-*") if path.name.removeprefix("epoch-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("epoch-")), reverse=True)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below `folder` and drop all but the newest two; returns its directory."""
    target = folder / f"epoch-{checkpoint.state['epoch']:04d}"
    draft = folder / f"draft-{target.name}"
    for stale in (draft, target):
        shutil.rmtree(stale, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.model.items()}, draft / "model.safetensors")
    torch.save(checkpoint.optimizer, draft / "optimizer.pt")
    (draft / "state.json").write_text(json.dumps({"format": FORMAT, **checkpoint.state}, indent=1))
    files = sorted(draft.iterdir())
    (draft / "MANIFEST.json").write_text(json.dumps({path.name: _digest(path) for path in files}, indent=1))
    for path in (*files, draft / "MANIFEST.json", draft):
        _sync(path)
    draft.rename(target)
    _sync(folder)
    for old in _epochs(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _fault(directory: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        manifest = json.loads((directory / "MANIFEST.json").read_text())
        if not isinstance(manifest, dict) or set(manifest) != FILES:
            return f"MANIFEST.json does not list {', '.join(sorted(FILES))}"
        changed = [name for name, digest in manifest.items() if _digest(directory / name) != digest]
    except (OSError, ValueError) as error:
        return str(error)
    return f"{', '.join(changed)} differ from MANIFEST.json" if changed else None


def read(directory: Path) -> Checkpoint:
    """One checkpoint directory, verified.

    Raises:
        ValueError: the files do not match the manifest, or are of another format.
    """
    if fault := _fault(directory):
        raise ValueError(f"a checkpoint must match its manifest, but in {directory} {fault}; use an older one")
    state = json.loads((directory / "state.json").read_text())
    if state.pop("format") != FORMAT:
        raise ValueError(f"checkpoints must have format {FORMAT}, but {directory} has another; train again")
    optimizer = torch.load(directory / "optimizer.pt", weights_only=True)
    return Checkpoint(load_file(directory / "model.safetensors"), optimizer, state)


def latest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint below `folder`; None if there is none. Damaged ones are warned of."""
    for directory in _epochs(folder):
        try:
            return read(directory)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
    return None

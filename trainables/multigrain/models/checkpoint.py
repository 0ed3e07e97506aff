"""Training state <-> directory: whole or absent, checked by hash, loaded without pickle.

`<folder>/step-00001234/` holds `model.safetensors`, `optimizer.pt` (tensors and numbers only; left out of
a model that is not to be trained on), `state.json` and, written last, `MANIFEST.json` with the size and
SHA-256 of each. Neither torch nor safetensors notices a flipped byte, so a checkpoint that does not match
its manifest is passed over, with a warning, for the one before.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

FORMAT = 2
FILES, OPTIMIZER = {"model.safetensors", "state.json"}, "optimizer.pt"
NETWORK, AVERAGED = "network.", "ema."
"""What the names of the network's tensors begin with, and those of its running average."""
_LEAST_FREE = 2**16
"""Bytes; a disk with less is full, whatever is still to be written."""
KEEP = 2
"""Checkpoints kept: the newest, and one to fall back to."""


class Checkpoint(NamedTuple):
    """What a run needs to go on, or a reader to use the model."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """JSON: `steps` done in all, the rest is the caller's."""

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The model's tensors whose names begin so, named by the rest."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.model.items() if name.startswith(prefix)}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _directories(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below `folder` and drop all but the newest two; returns its directory.

    Raises:
        OSError: it cannot be written; where the disk is full, with what is needed. Those before it stay.
    """
    target = folder / f"step-{checkpoint.state['steps']:08d}"
    draft = folder / f"draft-{target.name}"
    for stale in (draft, target):
        shutil.rmtree(stale, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in checkpoint.model.items()}, draft / "model.safetensors")
        if checkpoint.optimizer:
            torch.save(checkpoint.optimizer, draft / OPTIMIZER)
        (draft / "state.json").write_text(json.dumps({"format": FORMAT, **checkpoint.state}, indent=1))
        files = sorted(draft.iterdir())
        (draft / "MANIFEST.json").write_text(json.dumps({path.name: _digest(path) for path in files}, indent=1))
        for path in (*files, draft / "MANIFEST.json", draft):
            _sync(path)
        draft.rename(target)
    except BaseException as error:
        full = _full(draft, checkpoint)
        shutil.rmtree(draft, ignore_errors=True)
        if full and isinstance(error, Exception):  # of any kind: safetensors and torch have their own
            raise full from error
        raise
    _sync(folder)
    # What was just written stays even beside damaged ones of more steps, which a run that went back has left.
    for old in [path for path in _directories(folder) if path != target][KEEP - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _full(draft: Path, checkpoint: Checkpoint) -> OSError | None:
    """That the disk has no room for what is still to be written of a checkpoint; None if it has."""
    tensors = [value for value in pytree.tree_leaves(checkpoint) if isinstance(value, Tensor)]
    needed = sum(tensor.nbytes for tensor in tensors)
    written = sum(path.stat().st_size for path in draft.iterdir())
    if (free := shutil.disk_usage(draft).free) > max(needed - written, _LEAST_FREE):
        return None
    return OSError(
        errno.ENOSPC,
        f"a checkpoint of {needed:,} bytes must fit into {draft.parent}, but after {written:,} there are {free:,} "
        "free; make room, and the same command carries on from the checkpoint before",
    )


def _copy(value: Any, old: Any) -> Any:
    """A tensor's copy on the CPU, in the memory of `old` if it fits; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(old, Tensor) and (old.shape, old.dtype) == (value.shape, value.dtype):
        return old.copy_(value.detach())
    return value.detach().to("cpu", copy=True)


class Writer:
    """Saves checkpoints in the background: only the copy of the tensors holds the training up.

    One is written at a time; `wait` returns when the last is safe, or raises what kept it from being written.
    The memory of a copy serves the next: fresh memory takes several times as long to fill.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._copies: list[Any] = []

    def save(self, checkpoint: Checkpoint) -> None:
        """Take a copy on the CPU, and write it."""
        self.wait()
        values, structure = pytree.tree_flatten(checkpoint)
        self._copies = [_copy(value, old) for value, old in zip_longest(values, self._copies[: len(values)])]
        self._pending = self._thread.submit(save, self.folder, pytree.tree_unflatten(self._copies, structure))

    def wait(self) -> None:
        """Until nothing is being written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _fault(directory: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        manifest = json.loads((directory / "MANIFEST.json").read_text())
        if not isinstance(manifest, dict) or set(manifest) - {OPTIMIZER} != FILES:
            return f"MANIFEST.json does not list {', '.join(sorted(FILES))}"
        changed = [name for name, digest in manifest.items() if _digest(directory / name) != digest]
    except OSError as error:
        return str(error)
    except ValueError as error:
        return f"MANIFEST.json is not JSON ({error})"
    return f"{', '.join(changed)} differ from MANIFEST.json" if changed else None


def read(directory: Path) -> Checkpoint:
    """One checkpoint directory, verified.

    Raises:
        ValueError: the files do not match the manifest, or are of another format.
    """
    if fault := _fault(directory):
        raise ValueError(f"a checkpoint must match its manifest, but in {directory} {fault}; use an older one")
    state = json.loads((directory / "state.json").read_text())
    if state.pop("format", None) != FORMAT:
        raise ValueError(f"checkpoints must have format {FORMAT}, but {directory} has another; train again")
    listed = json.loads((directory / "MANIFEST.json").read_text())
    optimizer = torch.load(directory / OPTIMIZER, weights_only=True) if OPTIMIZER in listed else {}
    return Checkpoint(load_file(directory / "model.safetensors"), optimizer, state)


def latest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint below `folder`; None if there is none. Damaged ones are warned of."""
    for directory in _directories(folder):
        try:
            return read(directory)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
    return None

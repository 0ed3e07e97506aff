"""Checkpoints: training states as directories, written completely or not at all, verified by hash, without pickle.

`<folder>/step-00001234/` holds `model.safetensors`, `optimizer.pt` (tensors and numbers only; absent if the model is
not to be trained further), `state.json` and, written last, `MANIFEST.json` with the size and SHA-256 of each file.
Neither torch nor safetensors notices a flipped byte: a checkpoint that does not match its manifest is skipped with a
warning, and the one before is used.
"""

import errno
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

from multigrain.digests import file_digest

FORMAT = 2
FILES, OPTIMIZER = {"model.safetensors", "state.json"}, "optimizer.pt"
NETWORK, AVERAGED = "network.", "ema."
"""Prefixes of the names of the network's tensors, and of those of its running average."""
_LEAST_FREE = 2**16
"""Free space, in bytes, below which a disk counts as full."""
KEEP = 2
"""Number of checkpoints kept: the newest, and one to fall back to."""


class Checkpoint(NamedTuple):
    """State of a training run: all that resuming it, or using its model, needs."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """Values for JSON: `steps`, the number of steps done in all, and values of the caller."""

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors of the model whose names start with a prefix, by their names without it."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.model.items() if name.startswith(prefix)}


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _directories(folder: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below `folder`, delete all but the newest two, and return its directory.

    Raises:
        OSError: the checkpoint cannot be written; on a full disk the message tells the space needed. Older ones stay.
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
        (draft / "MANIFEST.json").write_text(json.dumps({path.name: digest(path) for path in files}, indent=1))
        for path in (*files, draft / "MANIFEST.json", draft):
            _sync(path)
        draft.rename(target)
    except BaseException as error:
        full = _full(draft, checkpoint)
        shutil.rmtree(draft, ignore_errors=True)
        if full and isinstance(error, Exception):  # safetensors and torch raise exceptions of their own
            raise full from error
        raise
    _sync(folder)
    # Keep the new checkpoint even if there are damaged ones of more steps, from which the run went back.
    for old in [path for path in _directories(folder) if path != target][KEEP - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _full(draft: Path, checkpoint: Checkpoint) -> OSError | None:
    """An error that tells the space needed, if the disk has no room for the rest of a checkpoint; None if it has."""
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
    """Copy a tensor to the CPU, into the memory of `old` if it fits; return other values as they are."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(old, Tensor) and (old.shape, old.dtype) == (value.shape, value.dtype):
        return old.copy_(value.detach())
    return value.detach().to("cpu", copy=True)


class Writer:
    """Saves checkpoints in the background: training waits only for the copy of the tensors.

    Checkpoints are written one at a time. `wait` returns when the last one is on disk, or raises the error of its
    writing. Copies reuse the memory of the copy before, because new memory takes several times as long to fill.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._copies: list[Any] = []

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint to the CPU, and start writing it."""
        self.wait()
        values, structure = pytree.tree_flatten(checkpoint)
        self._copies = [_copy(value, old) for value, old in zip_longest(values, self._copies[: len(values)])]
        self._pending = self._thread.submit(save, self.folder, pytree.tree_unflatten(self._copies, structure))

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Wait as `wait` does, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _fault(directory: Path) -> str | None:
    """The damage of a checkpoint directory, as a clause of a message; None if it is intact."""
    try:
        manifest = json.loads((directory / "MANIFEST.json").read_text())
        if not isinstance(manifest, dict) or set(manifest) - {OPTIMIZER} != FILES:
            return f"MANIFEST.json does not list {', '.join(sorted(FILES))}"
        changed = [name for name, recorded in manifest.items() if digest(directory / name) != recorded]
    except OSError as error:
        return str(error)
    except ValueError as error:
        return f"MANIFEST.json is not JSON ({error})"
    return f"{', '.join(changed)} differ from MANIFEST.json" if changed else None


def read(directory: Path) -> Checkpoint:
    """Read and verify one checkpoint directory.

    Raises:
        ValueError: the files do not match the manifest, or have another format.
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
    """The newest intact checkpoint below `folder`, or None; warns of damaged ones."""
    for directory in _directories(folder):
        try:
            return read(directory)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
    return None

"""One pass through the trunk for each size: the embeddings of many exponents, pooled from the same maps."""

import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from multigrain import distributed as group
from multigrain.data.loading import Source, evaluation_batches, readable
from multigrain.data.transforms import EvaluationTransform, scale
from multigrain.hooks import EndedError, Heartbeat, no_heartbeat
from multigrain.models.multigrain import MultiGrain, l2_normalise
from multigrain.models.pooling import gem_all
from multigrain.models.whitening import ROWS, Whitening

BLOCK = 1024
"""Pictures in a file of embeddings: what a crash costs."""


class Setting(NamedTuple):
    """How pictures become descriptors."""

    size: int
    """s*, in pixels."""
    p: float
    """p*, the exponent."""
    whitened: bool

    @property
    def name(self) -> str:
        """Such as `500/p4-whitened`."""
        return f"{self.size}/p{self.p:g}{'-whitened' if self.whitened else ''}"


@torch.no_grad()
def pooled(network: MultiGrain, images: Tensor, exponents: Sequence[float]) -> Tensor:
    """Embeddings (P, B, C) of images (B, 3, H, W) in [0, 1], not normalised, computed in fp32."""
    layout = torch.channels_last  # the faster one for large images, as in training
    shown = ((images - network.mean) / network.std).contiguous(memory_format=layout)
    with torch.autocast(images.device.type, enabled=False):
        return gem_all(network.trunk.to(memory_format=layout)(shown), exponents)


def embed(
    network: MultiGrain,
    pictures: Sequence[Source],
    size: int,
    transform: EvaluationTransform,
    exponents: Sequence[float],
    device: torch.device,
    loaders: int = 0,
    folder: Path | None = None,
    heartbeat: Heartbeat = no_heartbeat,
) -> dict[float, NDArray[np.float32]]:
    """Embeddings (N, C) of pictures for each exponent, in order, not normalised, computed in fp32.

    With a process group, every rank embeds its share and gets the whole.

    Args:
        network: on `device`; it is left in evaluation mode.
        size, transform: as in `augment.evaluation_pixels`.
        exponents: at least 1; the network's own plays no part.
        loaders: processes that read the files; 0: this one does.
        folder: where embeddings lie, not in memory, and are kept as they are made, so that a later call with the same
            network, pictures and settings reads those instead. Pictures count as the same if name, length and time of
            the file are.
        heartbeat: called after each batch.
    Raises:
        EndedError: `heartbeat` was True on a rank.
        DataError: a picture cannot be read.
    """
    rank, world = group.rank_and_size()
    exponents = tuple(map(float, exponents))
    mine = _share(network.eval(), pictures[rank::world], size, transform, exponents, device, loaders, folder, heartbeat)
    shares = [mine] * world
    if distributed.is_initialized():
        distributed.all_gather_object(shares, mine)
    whole_shares = [share for share in shares if share is not None]
    if len(whole_shares) < world:
        raise EndedError
    if world == 1:
        return dict(zip(exponents, whole_shares[0], strict=True))
    whole = room((len(exponents), len(pictures), whole_shares[0].shape[2]), folder)
    for index, share in enumerate(whole_shares):
        whole[:, index::world] = share
    return dict(zip(exponents, whole, strict=True))


def _share(
    network: MultiGrain,
    pictures: Sequence[Source],
    size: int,
    transform: EvaluationTransform,
    exponents: tuple[float, ...],
    device: torch.device,
    loaders: int,
    folder: Path | None,
    heartbeat: Heartbeat,
) -> NDArray[np.float32] | None:
    """Embeddings (P, N, C) of one rank's pictures; None if `heartbeat` was True meanwhile."""
    found = room((len(exponents), len(pictures), network.classifier.in_features), folder)
    blocks = [range(start, min(start + BLOCK, len(pictures))) for start in range(0, len(pictures), BLOCK)]
    kept: dict[int, _Kept] = {}
    if folder is not None:
        settings = (_digest(network), size, transform, exponents)
        kept = {block.start: _Kept(folder, settings, [pictures[i] for i in block]) for block in blocks}
        blocks = [block for block in blocks if not kept[block.start].read(found[:, block.start : block.stop])]
    missing = {block.start: len(block) for block in blocks}
    for positions, images in evaluation_batches(pictures, transform, size, loaders=loaders, blocks=blocks):
        found[:, positions] = pooled(network, scale(images.to(device)), exponents).cpu().numpy()
        start = positions[0] // BLOCK * BLOCK
        missing[start] -= len(positions)
        if kept and not missing[start]:
            kept[start].write(found[:, start : start + BLOCK])
        if heartbeat():
            return None
    return found


def room(shape: tuple[int, ...], folder: Path | None) -> NDArray[np.float32]:
    """Zeros; with a folder they lie in a file there, which has no name and goes with them, and not in memory."""
    if folder is None or 0 in shape:
        return np.zeros(shape, "f4")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, "f4", "w+", shape=shape)


class _Kept:
    """A file of the embeddings of one block: its name has a hash of what they are of, and one of its content."""

    def __init__(self, folder: Path, settings: tuple[object, ...], pictures: Sequence[Source]) -> None:
        self.folder = folder
        self.name = _hash(repr((settings, *map(_identity, pictures))).encode())

    def read(self, into: NDArray[np.float32]) -> bool:
        """Whether there were embeddings to put into (P, n, C); what is damaged is removed, with a warning."""
        for path in self.folder.glob(f"{self.name}.*.npy"):
            content = path.read_bytes()
            if path.name == f"{self.name}.{_hash(content)}.npy":
                into[:] = np.load(io.BytesIO(content))
                return True
            warnings.warn(f"{path} is damaged; its embeddings are computed again", stacklevel=2)
            path.unlink()
        return False

    def write(self, embeddings: NDArray[np.float32]) -> None:
        """Keep (P, n, C): the file is there as a whole, or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, embeddings)
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{self.name}.{os.getpid()}"
        try:
            draft.write_bytes(buffer.getbuffer())
            draft.replace(self.folder / f"{self.name}.{_hash(buffer.getbuffer())}.npy")
        finally:
            draft.unlink(missing_ok=True)


def _hash(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _digest(network: MultiGrain) -> str:
    """Of all that the embeddings depend on."""
    digest = hashlib.sha256()
    for name, tensor in {**network.trunk.state_dict(), "mean": network.mean, "std": network.std}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _identity(picture: Source) -> tuple[object, ...]:
    """What tells a picture from others, the times when its file was another included."""
    path, box, turn = (picture, None, 0) if isinstance(picture, Path) else picture
    with readable(picture):
        file = path.stat()
    return os.path.abspath(path), file.st_size, file.st_mtime_ns, box and tuple(map(float, box)), turn


def descriptors(
    embeddings: NDArray[np.float32], whitening: Whitening | None, folder: Path | None = None
) -> NDArray[np.float32]:
    """Descriptors (N, D) of unit norm, of embeddings (N, C); `folder` as in `room`."""
    transform = whitening.transform if whitening else l2_normalise
    count, channels = embeddings.shape
    found = room((count, whitening.projection.shape[1] if whitening else channels), folder)
    for start in range(0, count, ROWS):
        found[start : start + ROWS] = transform(torch.from_numpy(embeddings[start : start + ROWS])).numpy()
    return found

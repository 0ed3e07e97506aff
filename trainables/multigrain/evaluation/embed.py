"""Embeddings of images at many pooling exponents, pooled from the same maps of one pass through the trunk."""

import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from multigrain.config.training import MultiGrainSpec
from multigrain.data.loading import Source, evaluation_batches, readable
from multigrain.data.picture import Picture
from multigrain.data.transforms import EvaluationTransform, scale
from multigrain.digests import digest
from multigrain.distributed import rank_and_size
from multigrain.hooks import EndedError, Heartbeat, no_heartbeat
from multigrain.models.multigrain import MultiGrain, l2_normalise
from multigrain.models.pooling import gem_all
from multigrain.models.whitening import ROWS, Whitening

BLOCK = 1024
"""Images whose embeddings share a file; a crash costs at most these."""


class Setting(NamedTuple):
    """Size, exponent and whitening by which images become descriptors."""

    size: int
    """s*, in pixels."""
    p: float
    """p*, the exponent."""
    whitened: bool

    @property
    def name(self) -> str:
        """Name such as `500/p4-whitened`."""
        return f"{self.size}/p{self.p:g}{'-whitened' if self.whitened else ''}"


class SettingGrid(NamedTuple):
    """Sizes and exponents at which a network is evaluated, its own first."""

    own: Setting
    """The setting that the network was trained for, not whitened."""
    sizes: tuple[int, ...]
    exponents: tuple[float, ...]

    @classmethod
    def of(cls, network: MultiGrain, spec: MultiGrainSpec, sizes: Sequence[int], exponents: Sequence[float]) -> Self:
        """Add sizes and exponents to the network's own. Exponents that are equal to six digits count as one."""
        own = Setting(spec.evaluation_size, max(1.0, float(network.pool.p)), False)  # a learnt p counts as 1 below 1
        by_name: dict[str, float] = {}
        for p in (own.p, *exponents):  # a p learnt as 2.2 in fp32 has the name of 2.2
            by_name.setdefault(f"{p:g}", p)
        return cls(own, tuple(dict.fromkeys((own.size, *sizes))), tuple(by_name.values()))

    def exponent(self, p: float) -> float:
        """Return the exponent of the grid that counts as `p`."""
        return next(one for one in self.exponents if f"{one:g}" == f"{p:g}")


@torch.no_grad()
def pooled(network: MultiGrain, images: Tensor, exponents: Sequence[float]) -> Tensor:
    """Compute embeddings (P, B, C) of images (B, 3, H, W) in [0, 1] in fp32; they are not normalised."""
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
    """Compute the embeddings (N, C) of pictures for each exponent, in order, in fp32; they are not normalised.

    With a process group, every rank must call it; each embeds its share and gets the whole.

    Args:
        network: on `device`; it is left in evaluation mode.
        size, transform: see `data.transforms.evaluation_pixels`.
        exponents: at least 1; the network's own exponent is not used.
        loaders: processes that read the files; with 0, this process reads them.
        folder: the place for embeddings instead of memory. They are kept there block by block, and a later call with
            the same network, pictures and settings reads them. Pictures count as the same if name, length and time of
            the file are the same.
        heartbeat: called after each batch.
    Raises:
        EndedError: `heartbeat` returned True on a rank.
        DataError: a picture cannot be read.
    """
    rank, world = rank_and_size()
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
    whole = array((len(exponents), len(pictures), whole_shares[0].shape[2]), folder)
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
    """Compute the embeddings (P, N, C) of one rank's pictures; None if `heartbeat` returned True."""
    found = array((len(exponents), len(pictures), network.classifier.in_features), folder)
    blocks = [range(start, min(start + BLOCK, len(pictures))) for start in range(0, len(pictures), BLOCK)]
    files: dict[int, _BlockFile] = {}
    if folder is not None:
        settings = (_digest(network), size, transform, exponents)
        files = {block.start: _BlockFile(folder, settings, [pictures[i] for i in block]) for block in blocks}
        blocks = [block for block in blocks if not files[block.start].read(found[:, block.start : block.stop])]
    missing = {block.start: len(block) for block in blocks}
    for positions, images in evaluation_batches(pictures, transform, size, loaders=loaders, blocks=blocks):
        found[:, positions] = pooled(network, scale(images.to(device)), exponents).cpu().numpy()
        start = positions[0] // BLOCK * BLOCK
        missing[start] -= len(positions)
        if files and not missing[start]:
            files[start].write(found[:, start : start + BLOCK])
        if heartbeat():
            return None
    return found


def array(shape: tuple[int, ...], folder: Path | None) -> NDArray[np.float32]:
    """Return zeros; with a folder, they lie in an unnamed file there instead of memory, which goes with the array."""
    if folder is None or 0 in shape:
        return np.zeros(shape, "f4")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, "f4", "w+", shape=shape)


class _BlockFile:
    """A file of the embeddings of one block; its name holds a hash of the inputs and a hash of its content."""

    def __init__(self, folder: Path, settings: tuple[object, ...], pictures: Sequence[Source]) -> None:
        self.folder = folder
        self.name = _hash(repr((settings, *map(_identity, pictures))).encode())

    def read(self, into: NDArray[np.float32]) -> bool:
        """Copy stored embeddings to `into` (P, n, C) and return True; remove a damaged file, with a warning."""
        for path in self.folder.glob(f"{self.name}.*.npy"):
            content = path.read_bytes()
            if path.name == f"{self.name}.{_hash(content)}.npy":
                into[:] = np.load(io.BytesIO(content))
                return True
            warnings.warn(f"{path} is damaged; its embeddings are computed again", stacklevel=2)
            path.unlink()
        return False

    def write(self, embeddings: NDArray[np.float32]) -> None:
        """Store embeddings (P, n, C) in one atomic step."""
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
    return digest(content)[:32]


def _digest(network: MultiGrain) -> str:
    """Return the SHA-256 of the weights and constants on which embeddings depend."""
    total = hashlib.sha256()
    for name, tensor in {**network.trunk.state_dict(), "mean": network.mean, "std": network.std}.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _identity(picture: Source) -> tuple[object, ...]:
    """Return the path, size and time of the picture's file, its box, its turn, and whether it is upright."""
    path, box, *rest = Picture(picture) if isinstance(picture, Path) else picture
    with readable(picture):
        file = path.stat()
    return os.path.abspath(path), file.st_size, file.st_mtime_ns, box and tuple(map(float, box)), *rest


def descriptors(
    embeddings: NDArray[np.float32], whitening: Whitening | None, folder: Path | None = None
) -> NDArray[np.float32]:
    """Compute descriptors (N, D) of unit norm from embeddings (N, C); `folder` as in `array`."""
    transform = whitening.transform if whitening else l2_normalise
    count, channels = embeddings.shape
    found = array((count, whitening.projection.shape[1] if whitening else channels), folder)
    for start in range(0, count, ROWS):
        found[start : start + ROWS] = transform(torch.from_numpy(embeddings[start : start + ROWS])).numpy()
    return found

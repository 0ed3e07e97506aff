"""An exported MultiGrain model: images in, embeddings and classes out.

This file lies next to each exported model as `model.py`, with the text of `multigrain.data.decoding` in place of its
import. It needs NumPy, Pillow, and PyTorch or ONNX Runtime, and no package of its author.

    model = load(Path("folder"))
    for answer in model.answers(Path("photos").glob("*.jpg")):
        print(answer["embedding"], answer["class_name"], answer["score"], answer["error"])
"""

import hashlib
import json
import os
import re
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from multigrain.data.decoding import ImageError, Pixels, fault, opened, pixels, scaled_shape

COLUMNS = ("embedding", "class_id", "class_name", "score", "error")
BATCH = 32
"""Number of images that are read at a time; images of one shape pass through the network together."""
PROGRAM, NETWORK, FACTS, MANIFEST = "model.pt2", "model.onnx", "model.json", "MANIFEST.json"

Run = Callable[[np.ndarray[Any, Any]], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
Scale = Callable[[Pixels, int, int], Pixels]


class Model:
    """Embeds and classifies images: the `bytes` of image files, `pathlib.Path`, or arrays of uint8.

    An array is (H, W, 3), RGB, or (H, W), grey. A string is refused: in a service, it would let any client name a file
    of this machine.
    """

    def __init__(self, facts: dict[str, Any], run: Run, scale: Scale) -> None:
        """
        Args:
            facts: content of `model.json`.
            run: images (B, 3, H, W) uint8 -> embeddings (B, D) of unit norm, and probabilities (B, K).
            scale: scales an image to height and width; `scale_by_numpy` is slower than `scale_by_torch`, and equal.
        """
        self.facts, self.run, self.scale = facts, run, scale
        self._threads = ThreadPoolExecutor()  # kept, because to start threads takes longer than to read a small image

    def answers(self, images: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Yield an answer for each image, in order.

        It holds `embedding` (D floats of unit norm), `class_id`, `class_name`, `score` (the class's probability), and
        `error`: None, or the reason why the image cannot be read, and then the other values are None.
        """
        remaining = iter(images)
        while block := list(islice(remaining, BATCH)):
            yield from self._block(block)

    def __call__(self, table: Any) -> Any:
        """Return the answers for the column `image` of a pandas table, as a table."""
        import pandas as pd

        found = list(self.answers(table["image"]))
        return pd.DataFrame({name: pd.Series([row[name] for row in found], dtype=object) for name in COLUMNS})

    def _block(self, block: list[Any]) -> list[dict[str, Any]]:
        answers = [dict.fromkeys(COLUMNS) for _ in block]
        shapes: dict[tuple[int, ...], list[tuple[int, Pixels]]] = defaultdict(list)
        for place, shown in enumerate((self._threads.map if len(block) > 1 else map)(self._shown, block)):
            if isinstance(shown, str):
                answers[place]["error"] = shown
            else:
                shapes[shown.shape].append((place, shown))
        for group in shapes.values():
            batch = np.stack([shown.transpose(2, 0, 1) for _, shown in group])
            for (place, _), embedding, probabilities in zip(group, *self.run(batch), strict=True):
                best = int(probabilities.argmax())
                answers[place] |= {"embedding": embedding.tolist(), "class_id": best}
                answers[place] |= {"class_name": self.facts["classes"][best], "score": float(probabilities[best])}
        return answers

    def _shown(self, image: Any) -> Pixels | str:
        """Return the pixels for the network, or the reason why the image cannot be read."""
        facts = self.facts
        try:
            if isinstance(image, np.ndarray):
                return prepare(_colour(image), facts["transform"], facts["size"], self.scale)
            with opened(image) as file:
                # Models of before this fact was recorded were trained on images as stored.
                decoded = pixels(file, upright=facts.get("orientation") == "exif")
                return prepare(decoded, facts["transform"], facts["size"], self.scale)
        except Exception as error:  # Pillow raises many types, SyntaxError among them
            return fault(error)


def load(folder: Path, engine: str | None = None) -> Model:
    """Check every file in a folder, and load the model.

    Args:
        folder: an exported model.
        engine: `torch` or `onnx`; by default PyTorch if it is installed.
    Raises:
        ValueError: a file differs from the exported one, or holds a pickle; it is named.
    """
    check(folder)
    facts = json.loads((folder / FACTS).read_text())
    if engine is None:
        from importlib.util import find_spec

        engine = "torch" if find_spec("torch") else "onnx"
    if engine == "torch":
        return Model(facts, _torch(folder / PROGRAM), scale_by_torch)
    return Model(facts, _onnx(folder / NETWORK), scale_by_numpy)


def _torch(file: Path) -> Run:
    """Load the exported program.

    `torch.export.load` unpickles example inputs and entries marked as pickled; an archive with either is refused first.
    This is no defence against the author of the archive: torch evaluates the sizes in a graph as Python code.
    """
    if fault := _pickled(file):
        raise ValueError(f"a program must not hold a pickle, but {file} does: {fault}; export the model again")
    import torch

    module = torch.export.load(file).module()

    @torch.no_grad()
    def run(images: np.ndarray[Any, Any]) -> Any:
        return tuple(output.numpy() for output in module(torch.from_numpy(images)))

    return run


def _onnx(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0: one for each core
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores to others
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["embedding", "probabilities"], {"images": images})


def check(folder: Path) -> None:
    """Compare every file below a folder with its manifest.

    Raises:
        ValueError: files are changed, missing, or not listed; they are named.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"a model must have a readable {MANIFEST}, but in {folder}: {error}; fetch it again"
        ) from error
    found = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    found = {name for name in found - {MANIFEST} if "__pycache__" not in name}
    wrong = [f"{name} is missing" for name in manifest.keys() - found]
    wrong += [f"{name} is not listed" for name in found - manifest.keys()]
    wrong += [f"{name} was changed" for name in found & manifest.keys() if manifest[name] != digest(folder / name)]
    if wrong:
        faults = ", ".join(sorted(wrong))
        raise ValueError(f"a model's files must match its {MANIFEST}, but in {folder} {faults}; fetch it again")


def digest(file: Path) -> dict[str, Any]:
    """Return the size and the SHA-256 of a file."""
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _pickled(program: Path) -> str | None:
    """Name the entry of a `torch.export` archive that would be unpickled, or run as machine code; None without one."""
    if not _has_one_directory(program):
        return "it can be read in two ways"
    with zipfile.ZipFile(program) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            return "two entries of one name"
        for entry in filter(lambda entry: entry.file_size, entries.values()):
            name = entry.filename.partition("/")[2]  # the archive's own name comes first
            if name.startswith("data/") and name.endswith("_config.json"):
                if any(payload["use_pickle"] for payload in json.loads(archive.read(entry))["config"].values()):
                    return f"{entry.filename} names pickled tensors"
            elif not (name in _PLAIN or name.endswith(".json") or re.fullmatch(_RAW, name)):
                return entry.filename
    return None


def _has_one_directory(archive: Path) -> bool:
    """Return True if the directory of a ZIP file ends where its end record begins, and that is last.

    Python and PyTorch find other directories in other files. PyTorch writes a ZIP64 record, too; it must agree.
    """
    with archive.open("rb") as file:
        start, size = file.read(4), file.seek(0, 2)
        file.seek(max(0, size - 98))
        end = file.read().rjust(98, b"\0")  # 56 bytes of the ZIP64 record, 20 of its locator, 22 of the end record
    signature, length, first, comment = struct.unpack("<4s8xIIH", end[76:])
    place = size - 22
    if end[56:60] == b"PK\6\7":
        place = size - 98
        head, *wide, located = struct.unpack("<12s28xQQ8xQ4x", end[:76])
        if head != b"PK\6\6" + struct.pack("<Q", 44) or located != place:
            return False
        if [length, first] != [min(number, 2**32 - 1) for number in wide]:
            return False
        length, first = wide
    return (start, signature, comment) == (b"PK\3\4", b"PK\5\6", 0) and first + length == place


_PLAIN = {"archive_format", "archive_version", "byteorder", ".data/serialization_id", ".data/version"}
_RAW = r"data/(weights/weight|constants/tensor)_\d+"


def _colour(image: Pixels) -> Pixels:
    """Return an array of pixels as (H, W, 3)."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
        raise ImageError(f"has to be uint8, (H, W, 3) or (H, W), to be an image, not {image.dtype}, {image.shape}")
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def prepare(image: Pixels, transform: str, size: int, scale: Scale) -> Pixels:
    """Scale and crop an image for the network: (H, W, 3) -> (h, w, 3).

    `crop` scales the smaller side to int(256/224 size) and cuts out the central square of `size`. `rect` scales the
    larger side to `size` and keeps the proportions.

    Raises:
        ImageError: see `scaled_shape`.
    """
    height, width = image.shape[:2]
    if transform == "rect":
        longer = max(height, width)
        return scale(image, max(1, height * size // longer), max(1, width * size // longer))
    height, width = scaled_shape(height, width, int(size * 256 / 224))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return scale(image, height, width)[top : top + size, left : left + size]


def scale_by_torch(image: Pixels, height: int, width: int) -> Pixels:
    """Scale an image (H, W, 3) to (height, width, 3), bilinear with antialiasing."""
    import torch

    pixels = torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def scale_by_numpy(image: Pixels, height: int, width: int) -> Pixels:
    """Do the same as `scale_by_torch` to the bit, in whole numbers as PyTorch does."""
    across = _scale_rows(np.ascontiguousarray(image.transpose(1, 0, 2)), width)
    return _scale_rows(np.ascontiguousarray(across.transpose(1, 0, 2)), height)


def _scale_rows(image: Pixels, count: int) -> Pixels:
    """Scale the first axis to `count` with 16-bit weights; the largest weight sets the position of the binary point."""
    length = len(image)
    if length == count:
        return image
    scale = length / count
    support = max(scale, 1.0)
    centre = scale * (np.arange(count) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(int), 0)
    last = np.minimum((centre + support + 0.5).astype(int), length)
    places = first[:, None] + np.arange((last - first).max())
    weights = np.maximum(0, 1 - np.abs((places - centre[:, None] + 0.5) / support)) * (places < last[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    precision = 0
    while precision < 22 and int(0.5 + weights.max() * 2 ** (precision + 1)) < 2**15:
        precision += 1
    whole = (0.5 + weights * 2**precision).astype(np.int32)
    total = np.full((count, *image.shape[1:]), 1 << precision >> 1, np.int32)
    for place, weight in zip(np.minimum(places, length - 1).T, whole.T, strict=True):
        total += image[place] * weight[:, None, None]
    return np.clip(total >> precision, 0, 255).astype(np.uint8)

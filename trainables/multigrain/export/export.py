"""Export of a trained network to a folder that can be loaded without MultiGrain or Grainmill, and holds no pickle.

    model.pt2          the exported program, weights included, for PyTorch
    model.onnx         the same for ONNX runtimes
    model.json         classes, and how an image becomes the network's input
    model.py           `standalone` with `decoding`, which has `load(folder)`
    requirements.txt   packages that `model.py` needs
    signature.json     columns in and out, in MLflow's form
    checkpoint/        trained weights with all settings, to evaluate or fine-tune
    MANIFEST.json      size and SHA-256 of each of these

Both networks take uint8 (B, 3, H, W) of any B, H and W, and scale and normalise the pixels themselves. They are loaded
from the folder and compared with the trained network before the export counts as done.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim

from multigrain.data import decoding
from multigrain.export import inference, standalone
from multigrain.models import checkpoint, served_setting

PARITY = 1e-5
"""Largest allowed difference from the trained network, in an embedding or a probability."""
REQUIREMENTS = ("numpy", "pandas", "pillow", "torch")
SIGNATURE = {
    "inputs": [{"name": "image", "type": "binary", "required": True}],
    "outputs": [
        {"name": "embedding", "type": "array", "items": {"type": "double"}, "required": False},
        {"name": "class_id", "type": "long", "required": False},
        {"name": "class_name", "type": "string", "required": False},
        {"name": "score", "type": "double", "required": False},
        {"name": "error", "type": "string", "required": False},
    ],
}


def export(folder: Path, out: Path) -> dict[str, Any]:
    """Write the model of a training folder, as `inference.read` finds it, to a new folder.

    Returns:
        The facts of `model.json`.
    Raises:
        FileNotFoundError, ValueError: see `inference.read`; or the exported network answers differently.
    """
    served = inference.read(folder)
    saved = checkpoint.latest(folder)
    assert saved, "inference.read() found it"
    out.mkdir(parents=True)
    served_setting.write(out / "checkpoint", saved, served_setting.read(folder))
    _programs(served, out)
    (out / "model.py").write_text(program_text())
    facts = {"format": 1, **served.facts, "parity": _parity(served, out)}
    _write_json(out / standalone.FACTS, facts)
    _write_json(out / "signature.json", SIGNATURE)
    lines = [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]
    (out / "requirements.txt").write_text("\n".join(lines) + "\n")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    manifest = {path.relative_to(out).as_posix(): standalone.digest(path) for path in files}
    _write_json(out / standalone.MANIFEST, manifest)
    return facts


def program_text() -> str:
    """Return the text of `standalone` with that of `decoding`, which it imports, so that it stands alone."""
    before, after = re.split(
        "^from multigrain.data.decoding import .*$", Path(standalone.__file__).read_text(), flags=re.M
    )
    return f"{before}{Path(decoding.__file__).read_text()}{after}"


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1))


def _side(size: int) -> int:
    """Return a multiple of 32 near a size; every trunk takes it."""
    return max(32, round(size / 32) * 32)


def _programs(served: inference.Served, out: Path) -> None:
    # At 32 pixels the map of a trunk is 1 x 1, and the program would take 1 x 1 for its size in all images.
    side, free = max(64, _side(served.facts["size"])), Dim.DYNAMIC
    images = torch.zeros(2, 3, side, side + 32, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(served.answers, (images,), dynamic_shapes=({0: free, 2: free, 3: free},))
    torch.onnx.export(
        program,
        f=str(out / standalone.NETWORK),
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["images"],
        output_names=["embedding", "probabilities"],
    )
    program.example_inputs = None  # they would be pickled
    torch.export.save(program, out / standalone.PROGRAM)


@torch.no_grad()
def _parity(served: inference.Served, out: Path) -> dict[str, float]:
    """Return the largest difference between the trained network and each exported one, over images of three shapes.

    Raises:
        ValueError: a difference is larger than `PARITY`.
    """
    side, rng = _side(served.facts["size"]), np.random.default_rng(0)
    runs = {"torch": standalone._torch(out / standalone.PROGRAM), "onnx": standalone._onnx(out / standalone.NETWORK)}
    parity = dict.fromkeys(runs, 0.0)
    for shape in ((1, side, side), (2, side, side + 32), (3, side + 64, side)):
        images = rng.integers(0, 256, (shape[0], 3, *shape[1:]), dtype=np.uint8)
        expected = [output.numpy() for output in served.answers(torch.from_numpy(images))]
        for name, run in runs.items():
            differences = [float(np.abs(a - b).max()) for a, b in zip(run(images), expected, strict=True)]
            parity[name] = max(parity[name], *differences)
    if wrong := [f"{name} by {value:.1e}" for name, value in parity.items() if not value <= PARITY]:
        raise ValueError(
            f"an exported network must answer as the trained one to {PARITY:g}, but {', '.join(wrong)} differs; "
            f"report the trunk, {served.facts['trunk']}"
        )
    return parity

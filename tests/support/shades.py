"""A trainable that embeds images without learning: the mean colours in a grid of 4 x 4, and a bias.

The only parameter of a model is the number `bias`; models of different bias embed differently.
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from toy import Data, Evaluation, Spec, data_problems, evaluate, fit, metrics, prepare, sources, worker_problems

__all__ = ["Data", "Evaluation", "Spec", "data_problems", "evaluate", "fit", "metrics"]
__all__ += ["prepare", "sources", "worker_problems"]

DIMENSION = 49


def load(folder: Path) -> Any:
    bias = json.loads((folder / "state.json").read_text())["bias"]

    def row(content: bytes) -> dict[str, Any]:
        try:
            with Image.open(io.BytesIO(content)) as image:
                small = image.convert("RGB").resize((4, 4), Image.Resampling.BOX)
        except OSError:
            return dict.fromkeys(("embedding", "class_id", "class_name", "score")) | {"error": "is not an image"}
        vector = np.append(np.asarray(small, float).ravel() / 255 - 0.5, bias)
        vector /= np.linalg.norm(vector)
        return {"embedding": vector.tolist(), "class_id": 0, "class_name": "shade", "score": 0.5, "error": None}

    def predict(table: Any) -> Any:
        answers = [row(content) for content in table["image"]]
        names = ("embedding", "class_id", "class_name", "score", "error")
        return pd.DataFrame({name: pd.Series([one[name] for one in answers], dtype=object) for name in names})

    return predict


def export(folder: Path, out: Path) -> dict[str, Any]:
    columns = {"inputs": [("image", "binary")], "outputs": [("embedding", "double")]}
    signature = {
        side: [{"name": name, "type": kind, "required": True} for name, kind in some] for side, some in columns.items()
    }
    files = {
        "model.py": "import shades\n\ndef load(folder):\n    return shades.load(folder / 'checkpoint')\n",
        "requirements.txt": "pandas\n",
        "checkpoint/state.json": (folder / "state.json").read_text(),
        "signature.json": json.dumps(signature),
    }
    digests = {}
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
        digests[name] = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (out / "MANIFEST.json").write_text(json.dumps(digests))
    return {}


class Listing(NamedTuple):
    names: list[str]
    left_out: dict[str, str]
    litter: int


class Images(NamedTuple):
    root: str

    def listing(self) -> Listing:
        names = sorted(os.listdir(self.root))
        left_out = {name: "is of a type that is not read" for name in names if name.endswith(".jp2")}
        return Listing([name for name in names if name not in left_out], left_out, 0)

    def versions(self, names: Any) -> dict[str, tuple[int, str]]:
        paths = {name: Path(self.root) / name for name in names}
        found = {name: path.stat() for name, path in paths.items() if path.exists()}
        return {name: (state.st_size, str(state.st_mtime_ns)) for name, state in found.items()}

    def read(self, name: str) -> bytes:
        try:
            return (Path(self.root) / name).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror})") from error


def images(source: str, files: Any = None) -> Images:
    if not os.path.isdir(source):
        raise ValueError(f"there is no folder {source}")
    return Images(os.path.abspath(source))


def example(data: Data, files: Any = None) -> Any:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return pd.DataFrame({"image": [buffer.getvalue()]})


def register(tracker: Any, folder: Path, bias: float, name: str = "shades") -> str:
    """Register a version with this bias, make it the champion, and return its URI."""
    from grainmill.registry import models
    from grainmill.registry.model_card import ModelCard

    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"bias": bias}))
    run = tracker.start("made", {})
    card = ModelCard("shades", "", {}, sources(Data()), {}, {}, {}, {})
    made = models.register(tracker, run, name, folder, example(Data()), {}, card)
    tracker.client.set_registered_model_alias(name, models.CHAMPION, made.number)
    return made.uri


def write_images(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Write random images and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = [f"{number:05d}.png" for number in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / name)
    return names

"""A trainable of one's own, in NumPy: softmax regression on the handwritten digits of scikit-learn.

Grainmill searches, trains, registers and promotes any module with these names; `grainmill/trainable.py` describes them.
Run it with `PYTHONPATH=examples grainmill tune examples/own_trainable.yaml`.
"""

import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
from pydantic import BaseModel, Field


class Spec(BaseModel, frozen=True, extra="forbid"):
    epochs: int = 3
    rate: float = 0.01
    decay: float = 0.0
    seed: int = 0


class Data(BaseModel, frozen=True, extra="forbid"):
    held_out: int = Field(400, gt=0, lt=1000)


def metrics(data, files):
    return {"top1": "max"}


def sources(data, files):
    return [SimpleNamespace(name="digits", role="training", digest="sklearn-digits", rows=1797, where="scikit-learn")]


def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.data / 16, digits.target


def fit(spec, data, folder, heartbeat, files):
    (pixels, labels), val = _digits(), slice(data.held_out)
    file, weights, done = folder / "weights.json", np.zeros((64, 10)), 0
    if file.exists():  # an earlier process was cut short: its last epoch yields its result again
        saved = json.loads(file.read_text())
        weights, done = np.array(saved["weights"]), saved["epoch"]
    for epoch in range(max(1, done), spec.epochs + 1):
        order = np.random.default_rng((spec.seed, epoch)).permutation(np.arange(data.held_out, len(labels)))
        for index in order if epoch > done else ():
            share = np.exp(pixels[index] @ weights)
            gradient = np.outer(pixels[index], share / share.sum() - np.eye(10)[labels[index]])
            weights = (1 - spec.decay) * weights - spec.rate * gradient
        folder.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".draft").write_text(json.dumps({"epoch": epoch, "weights": weights.tolist()}))
        file.with_suffix(".draft").rename(file)
        top1 = np.mean((pixels[val] @ weights).argmax(axis=1) == labels[val])
        yield SimpleNamespace(epoch=epoch, metrics={"top1": float(top1)}, variants={})
        if heartbeat():  # the search ends this trial
            return


def load(folder):
    exported = folder / "MANIFEST.json"
    for name, file in json.loads(exported.read_text()).items() if exported.exists() else ():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != file["sha256"]:
            raise ValueError(f"{name} was changed; export the model again")
    weights = json.loads((folder / ("checkpoint" if exported.exists() else "") / "weights.json").read_text())["weights"]
    return lambda table: table.assign(digit=(np.stack(table["pixels"]) @ np.array(weights)).argmax(axis=1))[["digit"]]


def export(folder, out):
    (out / "checkpoint").mkdir(parents=True)
    shutil.copyfile(folder / "weights.json", out / "checkpoint" / "weights.json")
    shutil.copyfile(__file__, out / "model.py")  # holds `load`, and needs none of Grainmill's packages
    (out / "requirements.txt").write_text("numpy\npandas\npydantic\nscikit-learn\n")
    array = {"type": "array", "items": {"type": "double"}}
    columns = {"inputs": [{"name": "pixels", **array}], "outputs": [{"name": "digit", "type": "long"}]}
    (out / "signature.json").write_text(json.dumps(columns))
    contents = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    digests = {name: {"bytes": len(x), "sha256": hashlib.sha256(x).hexdigest()} for name, x in contents.items()}
    (out / "MANIFEST.json").write_text(json.dumps(digests))
    return {"classes": 10}


def example(data, files):
    import pandas as pd

    return pd.DataFrame({"pixels": [row.tolist() for row in _digits()[0][:2]]})

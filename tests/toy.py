"""A trainable without images, torch or noise: its score climbs evenly to the height that its settings name."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    epochs: int = 4
    height: float = 0.5
    kind: Literal["plain", "nan", "broken"] = "plain"
    """`nan`: the score is not a number. `broken`: raises in the second epoch."""


class Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    diary: str | None = None
    """A file that gets a line for each epoch that is really computed."""
    gate: str | None = None
    """A named pipe: from the second epoch on, a new process waits until someone opens it for writing."""


class Evaluation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    on: dict[str, str]
    """`scale`: a file that holds a number."""
    times: int = 1


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    low: float
    high: float
    paper: float | None = None


@dataclass(frozen=True)
class Assessment:
    figures: list[Figure]
    headlines: list[Figure]
    notes: list[str]
    files: list[Path]


@dataclass(frozen=True)
class Result:
    epoch: int
    metrics: dict[str, float]


def metrics(data: Data) -> dict[str, Literal["max", "min"]]:
    return {"score": "max", "cost": "min"}


def data_problems(data: Data, track: Any) -> list[str]:
    return []


def worker_problems(spec: Spec, workers: int) -> list[str]:
    return []


def prepare(data: Data, root: Path, track: Any) -> Data:
    return data


def fit(spec: Spec, data: Data, folder: Path) -> Iterator[Result]:
    state, done = folder / "state.json", 0
    if state.exists():
        done = json.loads(state.read_text())["epoch"]
        yield _result(spec, done)
    for epoch in range(done + 1, spec.epochs + 1):
        if spec.kind == "broken" and epoch == 2:
            raise RuntimeError("the toy is broken")
        if data.gate and epoch == 2:
            Path(data.gate).read_text()
        if int(os.environ.get("RANK", "0")) == 0:
            if data.diary:
                with Path(data.diary).open("a") as file:
                    file.write(f"{folder.name} {epoch}\n")
            folder.mkdir(parents=True, exist_ok=True)
            state.with_suffix(".draft").write_text(json.dumps({"epoch": epoch, "height": spec.height}))
            state.with_suffix(".draft").rename(state)
        yield _result(spec, epoch)


def _result(spec: Spec, epoch: int) -> Result:
    score = float("nan") if spec.kind == "nan" else spec.height * epoch / spec.epochs
    world_size = float(os.environ.get("WORLD_SIZE", "1"))
    return Result(epoch, {"score": score, "cost": spec.height**2, "world_size": world_size})


def load(folder: Path) -> Any:
    height = json.loads((folder / "state.json").read_text())["height"]

    def predict(table: Any) -> Any:
        return table.assign(y=table["x"] * height)[["y"]]

    return predict


def evaluate(folder: Path, settings: Evaluation, out: Path) -> Assessment:
    height = json.loads((folder / "state.json").read_text())["height"]
    value = height * float(Path(settings.on["scale"]).read_text()) * settings.times
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures.csv").write_text(f"height,{value}\n")
    figures = [Figure("scale/height", value, value - 0.1, value + 0.1, 0.5), Figure("scale/width", 2.0, 1.0, 3.0)]
    return Assessment(figures, figures[:1], ["a toy"], [out / "figures.csv"])


def example(data: Data) -> Any:
    import pandas as pd

    return pd.DataFrame({"x": [1.0, 2.0]})

"""A trainable without images, torch or noise: its score climbs evenly to the height that its settings name."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    epochs: int = 4
    steps: int = 1
    """Steps of an epoch. The toy saves its state after each epoch, and after the step where a heartbeat ends it."""
    height: float = 0.5
    kind: Literal["plain", "nan", "broken"] = "plain"
    """`nan`: the score is not a number. `broken`: the second epoch raises an error."""
    seed: int = 0
    seconds: float = 0.0
    """Duration of an epoch."""


class Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    diary: str | None = None
    """A file that gets a line for each step that is computed. Steps are counted over all epochs."""
    gate: str | None = None
    """A named pipe. A process that starts the second epoch waits until someone opens it for writing."""
    hold: str | None = None
    """A step, such as `trial-0001 5`, that lasts until a heartbeat ends the toy."""
    umpire: int | None = None
    """Local port of an umpire. Each process reports each step there and waits for an answer."""


class Evaluation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    on: dict[str, str]
    """`scale`: a file that holds a number; each worker puts its number where `{rank}` stands."""
    times: int = 1
    serve: str | None = None
    """Name of a setting. The evaluation writes a model for it, with the height times `times`."""
    paper: bool = False
    """Add published results."""
    extra: int = 0
    """Number of further measurements."""
    odd: str | None = None
    """Name of one further measurement."""
    queries: int = 0
    """Number of queries with a score each: the value of `scale/height` plus a ripple that depends on the height."""


@dataclass(frozen=True)
class Measurement:
    name: str
    value: float
    low: float
    high: float


class ResultTable(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


class QueryScores(NamedTuple):
    name: str
    data: str
    values: list[float]
    served: bool


@dataclass(frozen=True)
class EvaluationResult:
    measurements: list[Measurement]
    tables: list[ResultTable]
    notes: list[str]
    files: list[Path]
    model: Path | None
    served: str | None
    query_scores: list[QueryScores]


@dataclass(frozen=True)
class Result:
    epoch: int
    metrics: dict[str, float]
    variants: dict[str, dict[str, float]]


def metrics(data: Data, files: Any = None) -> dict[str, Literal["max", "min"]]:
    return {"score": "max", "cost": "min"}


def data_problems(data: Data, progress: Any, files: Any = None) -> list[str]:
    return []


def worker_problems(spec: Spec, workers: int) -> list[tuple[str, str]]:
    return []


def prepare(data: Data, root: Path, progress: Any, files: Any = None) -> Data:
    return data


class DataPart(NamedTuple):
    name: str
    role: Literal["training", "evaluation"]
    digest: str
    rows: int
    where: str


def sources(data: Data, files: Any = None) -> list[DataPart]:
    return [
        DataPart("heights", "training", "a1b2", 3, "nowhere"),
        DataPart("scale", "evaluation", "c3d4", 1, "nowhere"),
    ]


def fit(
    spec: Spec, data: Data, folder: Path, heartbeat: Callable[[], bool] = lambda: False, files: Any = None
) -> Iterator[Result]:
    state, rank = folder / "state.json", int(os.environ.get("RANK", "0"))
    done = _highest(json.loads(state.read_text())["step"] if rank == 0 and state.exists() else 0)
    if done and done % spec.steps == 0:
        yield _result(spec, done // spec.steps)
    for step in range(done + 1, spec.epochs * spec.steps + 1):
        _compute(spec, data, folder.name, step, rank)
        while data.hold == f"{folder.name} {step}" and not heartbeat():
            time.sleep(0.05)
        ends = _highest(heartbeat())
        if rank == 0 and (ends or step % spec.steps == 0):
            folder.mkdir(parents=True, exist_ok=True)
            state.with_suffix(".draft").write_text(json.dumps({"step": step, "height": spec.height}))
            state.with_suffix(".draft").rename(state)
        if ends and step < spec.epochs * spec.steps:
            return
        if step % spec.steps == 0:
            yield _result(spec, step // spec.steps)


def _compute(spec: Spec, data: Data, name: str, step: int, rank: int) -> None:
    if spec.kind == "broken" and step == spec.steps + 1:
        raise RuntimeError("the toy is broken")
    if data.gate and step == spec.steps + 1:
        Path(data.gate).read_text()
    time.sleep(spec.seconds / spec.steps)
    if rank == 0 and data.diary:
        with Path(data.diary).open("a") as file:
            file.write(f"{name} {step}\n")
    if data.umpire:
        with socket.create_connection(("127.0.0.1", data.umpire)) as line:
            line.sendall(f"{name} {step} {rank} {os.getpid()}\n".encode())
            line.recv(1)


def _highest(number: int) -> int:
    """Return the highest number among the ranks of the group. All ranks must call this."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return number
    import torch

    found = torch.tensor(number)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def _result(spec: Spec, epoch: int) -> Result:
    score = float("nan") if spec.kind == "nan" else spec.height * epoch / spec.epochs
    world_size = float(os.environ.get("WORLD_SIZE", "1"))
    variants = {"twice": {"score": 2 * score}} if epoch == spec.epochs else {}
    return Result(epoch, {"score": score, "cost": spec.height**2, "world_size": world_size}, variants)


SCRIPT = """\
import hashlib, json


def load(folder):
    listed = json.loads((folder / "MANIFEST.json").read_text())
    if any(hashlib.sha256((folder / name).read_bytes()).hexdigest() != file["sha256"] for name, file in listed.items()):
        raise ValueError("the toy was changed")
    height = json.loads((folder / "checkpoint" / "state.json").read_text())["height"]
    return lambda table: table.assign(y=table["x"] * height)[["y"]]
"""
SIGNATURE = {
    "inputs": [
        {"name": "x", "type": "double", "required": True},
        {"name": "image", "type": "binary", "required": False},
    ],
    "outputs": [{"name": "y", "type": "double", "required": True}],
}


def load(folder: Path) -> Any:
    height = json.loads((folder / "state.json").read_text())["height"]
    return lambda table: table.assign(y=table["x"] * height)[["y"]]


def export(folder: Path, out: Path) -> dict[str, Any]:
    state = (folder / "state.json").read_text()
    files = {"model.py": SCRIPT, "requirements.txt": "pandas\n", "checkpoint/state.json": state}
    files["signature.json"] = json.dumps(SIGNATURE)
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    digests = {
        name: {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in files.items()
    }
    (out / "MANIFEST.json").write_text(json.dumps(digests))
    return {"height": json.loads(state)["height"]}


PUBLISHED_COLUMNS = ("method", "lambda", "p", "size", "measure", "value", "source")
PUBLISHED = [
    ResultTable(
        "published: scale",
        PUBLISHED_COLUMNS,
        [
            ("Toy", "0.5", "3", "500", "height", "0.9150", "Table 7"),
            ("None", "", "1", "224", "height", "3.7800", "Table 8"),
        ],
    ),
    ResultTable(
        "published: copies strong with 10,000 distractors",
        PUBLISHED_COLUMNS,
        [("Toy", "1", "3", "800", "map", "0.5000", "Table 9")],
    ),
]


def evaluate(folder: Path, settings: Evaluation, out: Path, files: Any = None) -> EvaluationResult:
    """Measure the height on a scale. On several workers, rank 0 writes the files, and the ranks are counted."""
    height = json.loads((folder / "state.json").read_text())["height"]
    rank, workers = int(os.environ.get("RANK", "0")), 1.0
    value = height * float(Path(settings.on["scale"].format(rank=rank)).read_text()) * settings.times
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        count = torch.ones(1)
        torch.distributed.all_reduce(count)
        workers = float(count)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "figures.csv").write_text(f"height,{value}\n")
        if settings.serve:
            (out / "model").mkdir(exist_ok=True)
            (out / "model" / "state.json").write_text(json.dumps({"height": height * settings.times}))
    figures = [
        Measurement("scale/height", value, value - 0.1, value + 0.1),
        Measurement("scale/workers", workers, 1.0, 3.0),
        *(Measurement(f"scale/extra {number}", float(number), 0.0, 0.0) for number in range(settings.extra)),
        *([Measurement(settings.odd, 0.0, 0.0, 0.0)] if settings.odd else []),
    ]
    interval = f"{value - 0.1:.4f} to {value + 0.1:.4f}"
    tables = [
        ResultTable(
            "", ("", "value", "95 % interval", "paper"), [("scale/height", f"{value:.4f}", interval, "0.5000")]
        ),
        ResultTable(
            "heights",
            ("pixels \\ p*", "3", "inf"),
            [("224", "0.2500", f"{value:.4f}"), ("500", "0.1250", "3.0000")],
        ),
    ]
    return EvaluationResult(
        figures,
        tables + (PUBLISHED if settings.paper else []),
        [f"a toy, of rank {rank}"],
        [out / "figures.csv"],
        out / "model" if settings.serve else None,
        settings.serve,
        [
            QueryScores("scale/height", f"{settings.queries} queries", _ripple(mean, settings.queries), served)
            for mean, served in ((value / settings.times, False), *([(value, True)] if settings.serve else []))
            if settings.queries
        ],
    )


def _ripple(value: float, count: int) -> list[float]:
    return [value + 0.01 * ((7 * query + round(1000 * value)) % 11 - 5) for query in range(count)]


def images(source: str, files: Any = None) -> Any:
    raise ValueError("a toy has no images")


def example(data: Data, files: Any = None) -> Any:
    import pandas as pd

    return pd.DataFrame({"x": [1.0, 2.0]})

"""Shared by the benchmarks: contestants take turns, and the results become a table and a JSON file."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path("grainmill-runs/benchmarks")
"""Folder of the JSON files."""


class Goal(NamedTuple):
    """Goal of a contestant: the ratio by which it should be better than its peer."""

    contestant: str
    peer: str
    ratio: float | None = None
    """Smallest ratio; None shows the ratio without a goal."""


def machine() -> dict[str, Any]:
    """Hardware, versions and the load before the measurement, to be shown with the results."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")},
    }


def compare(contestants: dict[str, Callable[[], float]], rounds: int = 3) -> dict[str, list[float]]:
    """Measure each contestant once in each round, in turns, so that other load on the machine affects all of them."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(1, rounds + 1):
        for name, measure in contestants.items():
            print(f"round {turn} of {rounds}: {name}", end="\x1b[K\r", file=sys.stderr, flush=True)
            figures[name].append(measure())
    print(end="\x1b[K", file=sys.stderr, flush=True)
    return figures


def _row(name: str, values: list[float], note: str = "") -> str:
    spread = "".join(f"{value:>11.4g}" for value in (min(values), statistics.median(values), max(values)))
    return f"{name:<48}{spread}  {note}".rstrip()


def report(
    name: str,
    figures: dict[str, list[float]],
    goals: list[Goal],
    before: dict[str, Any],
    unit: str,
    more_is_better: bool = True,
) -> Path:
    """Print ratios and measurements with minimum, median and maximum over the rounds; write both as JSON.

    Args:
        figures: measurements, as `compare` returns them.
        before: `machine()`, called before the measurement.
        unit: unit of the measurements.
        more_is_better: True for rates, False for times.
    Returns:
        The JSON file.
    """
    print(f"{before['cpu']}, {before['cores']} cores, {before['gpu'] or 'no GPU'}; load before {before['load_before']}")
    print(f"{'times as good, round by round':<48}{'min':>11}{'median':>11}{'max':>11}")
    ratios = []
    for contestant, peer, goal in goals:
        pairs = zip(figures[contestant], figures[peer], strict=True)
        values = [ours / theirs if more_is_better else theirs / ours for ours, theirs in pairs]
        met = "" if goal is None else f"goal {goal:g}: {'met' if statistics.median(values) >= goal else 'missed'}"
        print(_row(f"{contestant} : {peer}", values, met))
        ratios.append({"contestant": contestant, "peer": peer, "goal": goal, "ratios": values})
    print(f"{unit:<48}{'min':>11}{'median':>11}{'max':>11}")
    for contestant, values in figures.items():
        print(_row(contestant, values))
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"name": name, **before, "unit": unit, "figures": figures, "ratios": ratios}, indent=1))
    print(path)
    return path

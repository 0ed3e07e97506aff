"""Where a registered model comes from: gathered when it is made, kept with the version, told in its card. Pure."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from grainmill.errors import hidden
from grainmill.trainable import DataPart

LONGEST = 5000
"""Characters of a version's description in MLflow's database."""


class Interval(NamedTuple):
    """A figure and the 95 % interval around it; None where none is known."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.low is None else f" [{self.low:.4f}, {self.high:.4f}]")


@dataclass(frozen=True)
class ModelCard:
    """Where a model comes from."""

    trainable: str
    experiment: str
    """The resolved experiment, as YAML."""
    places: Mapping[str, str]
    """Search, trial, training, runs and seed, by name."""
    data: Sequence[DataPart]
    environment: Mapping[str, str]
    """Python, packages, commit, and whether that was dirty."""
    hardware: Mapping[str, str]
    cost: Mapping[str, float]
    metrics: Mapping[str, Interval]
    """Of this training, each with the interval of its setting's mean over trainings, if there were several."""

    def tags(self) -> dict[str, str]:
        """To find versions by."""
        digests = {f"data.{source.name}": source.digest for source in self.data}
        told = {**self.places, **self.environment, **{f"hardware.{name}": text for name, text in self.hardware.items()}}
        cost = {f"cost.{name}": f"{seconds:.0f}" for name, seconds in self.cost.items()}
        return {name: hidden(text) for name, text in {**told, **digests, **cost}.items()}

    def json(self) -> str:
        """All of it."""
        parts = [{name: getattr(one, name) for name in DataPart.__annotations__} for one in self.data]
        return hidden(json.dumps(asdict(self) | {"data": parts}, indent=1))


def machine() -> dict[str, str]:
    """The processor, memory and graphics cards of this machine."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": f"{os.cpu_count()} x {names[0] if names else platform.machine()}",
        "memory": f"{memory:.0f} GiB",
        "gpu": ", ".join(cards) or "none",
    }


def card(name: str, facts: Mapping[str, Any], lineage: ModelCard) -> str:
    """The model card, in Markdown.

    Args:
        name: of the model.
        facts: that the export of the model told.
        lineage: where it comes from.
    """
    data = [(one.name, f"{one.rows} rows for {one.role}, digest {one.digest}, {one.where}") for one in lineage.data]
    cost = [(kind, f"{seconds:.0f}") for kind, seconds in lineage.cost.items()]
    return hidden(
        _part(f"# {name}", [("trainable", lineage.trainable), *((key, _short(value)) for key, value in facts.items())])
        + _part("## Figures, and 95 % intervals of the mean over trainings", lineage.metrics.items())
        + _part("## Data", data)
        + _part("## Training", [*lineage.places.items(), *cost, *lineage.hardware.items()])
        + _part("## Software", lineage.environment.items())
        + f"## Settings\n\n```yaml\n{lineage.experiment.strip()}\n```\n"
    )


def card_of_evaluated(
    source: str, model: str, served: str, facts: Mapping[str, Any], figures: Mapping[str, Interval]
) -> str:
    """The card of a model that an evaluation made of another.

    Args:
        source: the other's card.
        model: the other's name, with its version.
        served: the setting that this one serves.
        facts: that the export of this one told.
        figures: of the evaluation.
    """
    title, _, rest = source.partition("\n")
    made = [("made of", model), ("serves", served), *((key, _short(value)) for key, value in facts.items())]
    kept = rest[rest.index("\n## ") + 1 :] if "\n## " in rest else ""
    return _part(title, made) + _part("## Evaluation, with 95 % intervals over queries", figures.items()) + kept


def description(card: str, where: str) -> str:
    """A card as a version's description: as many of its sections as fit, and where it is whole."""
    note = f"The whole card is the artifact `{where}`."
    kept, *sections = card.split("\n## ")
    for section in sections:
        longer = f"{kept}\n## {section}"
        if len(longer) + len(note) >= LONGEST - 2:
            break
        kept = longer
    return f"{kept[: LONGEST - len(note) - 2].rstrip()}\n\n{note}"


def _part(heading: str, rows: Any) -> str:
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows]
    table = ["| | |", "|---|---|", *lines] if lines else ["None."]
    return "\n".join([heading, "", *table, "", ""])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        first = ", ".join(map(str, value[:10]))
        return f"{len(value)}: {first}{', ...' if len(value) > 10 else ''}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

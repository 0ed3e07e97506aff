"""Model cards: where a registered model comes from, as tags, JSON and Markdown. Reads and writes no files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from grainmill.config.addresses import hidden
from grainmill.trainable import DataPart

LONGEST = 5000
"""Largest length of a version's description in MLflow's database, in characters."""


class Interval(NamedTuple):
    """A value and its 95 % interval; None where no interval is known."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.low is None else f" [{self.low:.4f}, {self.high:.4f}]")


@dataclass(frozen=True)
class ModelCard:
    """Origin of a trained model."""

    trainable: str
    """Dotted path of the trainable's module."""
    experiment: str
    """The resolved experiment, as YAML."""
    places: Mapping[str, str]
    """Search, trial, training, runs and seed, by name."""
    data: Sequence[DataPart]
    environment: Mapping[str, str]
    """Versions of Python and packages, the commit, and `git.dirty` if the working tree had changes."""
    hardware: Mapping[str, str]
    cost: Mapping[str, float]
    """Cost by kind, such as `cpu_seconds`."""
    metrics: Mapping[str, Interval]
    """Metrics of this training; the interval is that of the mean over the trainings of its setting, if several."""

    def tags(self) -> dict[str, str]:
        """Tags of the version, to search by."""
        hardware = {f"hardware.{name}": text for name, text in self.hardware.items()}
        digests = {f"data.{part.name}": part.digest for part in self.data}
        cost = {f"cost.{name}": f"{seconds:.0f}" for name, seconds in self.cost.items()}
        tags = {**self.places, **self.environment, **hardware, **digests, **cost}
        return {name: hidden(text) for name, text in tags.items()}

    def json(self) -> str:
        """All fields, as JSON."""
        parts = [{name: getattr(part, name) for name in DataPart.__annotations__} for part in self.data]
        return hidden(json.dumps(asdict(self) | {"data": parts}, indent=1))

    def markdown(self, name: str, facts: Mapping[str, Any]) -> str:
        """The card for readers; `facts` are those that the export of the model returned."""
        data = [
            (part.name, f"{part.rows} rows for {part.role}, digest {part.digest}, {part.where}") for part in self.data
        ]
        cost = [(kind, f"{seconds:.0f}") for kind, seconds in self.cost.items()]
        return hidden(
            _section(f"# {name}", [("trainable", self.trainable), *_rows(facts)])
            + _section("## Metrics, with 95 % intervals of the mean over trainings", self.metrics.items())
            + _section("## Data", data)
            + _section("## Training", [*self.places.items(), *cost, *self.hardware.items()])
            + _section("## Software", self.environment.items())
            + f"## Settings\n\n```yaml\n{self.experiment.strip()}\n```\n"
        )


def evaluated_markdown(
    source: str, model: str, served: str, facts: Mapping[str, Any], measurements: Mapping[str, Interval]
) -> str:
    """Card of a model that an evaluation made of a registered one.

    Args:
        source: card of the evaluated version; its sections are kept.
        model: URI of the evaluated version.
        served: setting that the new model serves.
        facts: those that the export of the new model returned.
        measurements: results of the evaluation, by name.
    """
    title, _, rest = source.partition("\n")
    _, heading, kept = rest.partition("\n## ")
    head = _section(title, [("made of", model), ("serves", served), *_rows(facts)])
    results = _section("## Evaluation, with 95 % intervals over queries", measurements.items())
    return head + results + (heading + kept).removeprefix("\n")


def description(card: str, where: str) -> str:
    """Shorten a card to a version's description: the first sections that fit, and the path `where` of the artifact."""
    note = f"The whole card is the artifact `{where}`."
    kept, *sections = card.split("\n## ")
    for section in sections:
        longer = f"{kept}\n## {section}"
        if len(longer) + len(note) >= LONGEST - 2:
            break
        kept = longer
    return f"{kept[: LONGEST - len(note) - 2].rstrip()}\n\n{note}"


def _section(heading: str, rows: Any) -> str:
    cells = [(key, str(value).replace("|", "\\|").replace("\n", " ")) for key, value in rows]
    table = ["| | |", "|---|---|", *(f"| {key} | {cell} |" for key, cell in cells)] if cells else ["None."]
    return "\n".join([heading, "", *table, "", ""])


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, _short(value)) for key, value in facts.items()]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text}" for key, text in _rows(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        first = ", ".join(map(str, value[:10]))
        return f"{len(value)}: {first}{', ...' if len(value) > 10 else ''}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

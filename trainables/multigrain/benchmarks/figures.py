"""Figures of an evaluation: what they are called, and which of them count most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from multigrain.evaluation.embed import Setting


@dataclass(frozen=True)
class Measurement:
    """One measure of one benchmark at one setting."""

    benchmark: str
    part: str
    """A setting of the benchmark's protocol, such as `hard`; empty where there is one."""
    measure: str
    at: Setting
    value: float
    low: float
    high: float
    """Ends of the 95 % bootstrap interval over queries."""
    paper: float | None = None
    """What the paper has for its network of the same trunk, lambda and p, at this size."""

    @property
    def name(self) -> str:
        """Such as `roxford5k/hard/map/500/p4-whitened`; none begins with another and a slash."""
        parts = (self.benchmark, self.part, self.measure, self.at.name)
        return "/".join(part for part in parts if part).replace("@", "-at-").replace("+", "")  # MLflow's rules


class ResultGrid(NamedTuple):
    """One measure at every size and exponent."""

    title: str
    across: str
    """What the columns are."""
    down: str
    """What the rows are."""
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float]]


def grids(figures: Sequence[Measurement]) -> list[ResultGrid]:
    """For each part of each benchmark, whitened or not, its first measure: sizes down, exponents across."""

    first = {figure.benchmark: figure.measure for figure in reversed(figures)}
    panels: dict[tuple[str, str, bool], dict[tuple[int, float], float]] = {}
    for one in figures:
        if one.measure == first[one.benchmark]:
            panels.setdefault((one.benchmark, one.part, one.at.whitened), {})[one.at.size, one.at.p] = one.value
    found = []
    for (name, part, whitened), value in panels.items():
        sizes, exponents = sorted({size for size, _ in value}), sorted({p for _, p in value})
        title = " ".join(filter(None, (name, part, first[name]))) + (", whitened" if whitened else "")
        rows = {str(size): [value[size, p] for p in exponents] for size in sizes}
        found.append(ResultGrid(title, "p*", "s*, pixels", [f"{p:.3g}" for p in exponents], rows))
    return found


def headlines(figures: Sequence[Measurement], settings: Sequence[Setting]) -> list[Measurement]:
    """For each measure the figures at some settings, in that order, and the best of all; each once.

    At the settings after the first there is only a benchmark's first measure.
    """
    first = {figure.benchmark: figure.measure for figure in reversed(figures)}
    chosen: list[Measurement] = []
    for key in dict.fromkeys((figure.benchmark, figure.part, figure.measure) for figure in figures):
        group = [figure for figure in figures if (figure.benchmark, figure.part, figure.measure) == key]
        some = settings if group[0].measure == first[group[0].benchmark] else settings[:1]
        told = [figure for at in some for figure in group if figure.at == at]
        chosen += dict.fromkeys([*told, max(group, key=lambda figure: figure.value)])
    return chosen

"""What a trial asks of a Ray cluster: workers, CPUs and GPUs."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from grainmill.config.section import Section


class Need(NamedTuple):
    """What a trial takes of a cluster."""

    bundle: Mapping[str, float]
    """What one worker takes."""
    fewest: int
    """Workers with which it can go on."""
    most: int
    """Workers where there is room for all."""
    apart: bool = False
    """Whether each worker must have a node of its own."""


Count = Annotated[int, Field(ge=1)]


def _workers(value: Any) -> Any:
    """Checked by hand: a failed union would be reported once for each of its types."""
    counts = value if isinstance(value, list | tuple) else [value]
    if any(type(count) is not int for count in counts) or (counts is value and len(counts) != 2):
        raise ValueError(f"must be a whole number, or two as [min, max], got {value!r}; leave it out for 1")
    if min(counts) < 1:
        raise ValueError(f"a trial has 1 worker at least, got {value!r}; raise it")
    if counts[0] > counts[-1]:
        raise ValueError(f"min <= max must hold, got {value!r}; swap them")
    return tuple(counts) if counts is value else value


Workers = Annotated[Count | tuple[Count, Count], BeforeValidator(_workers)]
"""Of a trial: so many, or as few and as many as it may have."""


class Resources(Section):
    """What a trial gets from the cluster."""

    workers: Workers = 1
    """Workers of one trial; more than one train together through Ray Train. With [min, max], as many as there is room
    for, when a node has come or gone, too; they share the same batch."""
    retrain_workers: Workers = 1
    """Workers that train the winner again, likewise."""
    placement: Literal["pack", "spread"] = "pack"
    """`pack` puts the workers of a trial on as few nodes as hold them; `spread` puts each on a node of its own, or,
    where their number is [min, max], on as many nodes as there are."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPUs of one worker."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of one worker; a fraction lets workers share one."""
    concurrent: int | None = Field(None, ge=1)
    """Trials at once, at most; as many as the cluster holds when it has grown by default."""

    def need(self, workers: Workers) -> Need:
        """What a trial of so many workers takes from the cluster."""
        fewest, most = (workers, workers) if isinstance(workers, int) else workers
        return Need(self.bundle, fewest, most, self.placement == "spread" and fewest == most)

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker takes from the cluster."""
        needs = {"CPU": float(self.cpus_per_worker), "GPU": self.gpus_per_worker}
        return {name: amount for name, amount in needs.items() if amount}

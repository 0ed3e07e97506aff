"""Resources of a trial on a Ray cluster: workers, CPUs and GPUs."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from grainmill.config.section import Section


class Need(NamedTuple):
    """Resources that a trial takes from a cluster."""

    bundle: Mapping[str, float]
    """Amount of each resource that one worker takes, such as `{"CPU": 1.0}`."""
    fewest: int
    """Smallest number of workers with which the trial can go on."""
    most: int
    """Number of workers if there is room for all."""
    one_per_node: bool = False
    """True if each worker must have its own node."""


Count = Annotated[int, Field(ge=1)]


def _workers(value: Any) -> Any:
    """Check a number of workers, or two; pydantic would report a failed union once for each of its types."""
    counts = value if isinstance(value, list | tuple) else [value]
    if any(type(count) is not int for count in counts) or (counts is value and len(counts) != 2):
        raise ValueError(f"must be a whole number, or two as [min, max], got {value!r}; leave it out for 1")
    if min(counts) < 1:
        raise ValueError(f"a trial has 1 worker at least, got {value!r}; raise it")
    if counts[0] > counts[-1]:
        raise ValueError(f"min <= max must hold, got {value!r}; swap them")
    return tuple(counts) if counts is value else value


Workers = Annotated[Count | tuple[Count, Count], BeforeValidator(_workers)]
"""Number of workers of a trial, or the smallest and the largest number."""


class Resources(Section):
    """Workers of a trial, and their CPUs and GPUs."""

    workers: Workers = 1
    """Workers of one trial; several train together through Ray Train and share one batch. With [min, max], as many as
    the cluster has room for, also after a node has come or gone."""
    retrain_workers: Workers = 1
    """Workers of each training of the best trials again; a number, or [min, max]."""
    placement: Literal["pack", "spread"] = "pack"
    """`pack` puts the workers of a trial on as few nodes as possible. `spread` puts each on its own node, or, if their
    number is [min, max], on as many nodes as there are."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPUs of one worker."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of one worker; a fraction lets workers share one."""
    concurrent: int | None = Field(None, ge=1)
    """Largest number of trials at once; by default, as many as the fully grown cluster holds."""

    def need(self, workers: Workers) -> Need:
        """Resources of a trial with `workers` workers."""
        fewest, most = (workers, workers) if isinstance(workers, int) else workers
        return Need(self.bundle, fewest, most, self.placement == "spread" and fewest == most)

    @property
    def bundle(self) -> dict[str, float]:
        """Amount of each resource that one worker takes."""
        needs = {"CPU": float(self.cpus_per_worker), "GPU": self.gpus_per_worker}
        return {name: amount for name, amount in needs.items() if amount}

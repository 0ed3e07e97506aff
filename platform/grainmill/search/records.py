"""Record of a trial."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from grainmill.config.space import Setting

State = Literal["running", "paused", "complete", "stopped", "failed"]


@dataclass(frozen=True)
class TrialRecord:
    """State, setting and metrics of a trial."""

    number: int
    state: State
    setting: Setting
    history: tuple[Mapping[str, float], ...]
    """Metrics of each epoch, the first epoch first; each with `epoch`."""
    times: tuple[int, ...]
    """Time of the report of each epoch, in milliseconds since 1970."""
    cause: str | None
    """Reason of a failure."""
    variants: Mapping[str, Mapping[str, float]]
    """Metrics of the trained network at other evaluation settings, by name; they cost no training."""
    cost: Mapping[str, float]
    """`cpu_seconds` and `gpu_seconds`, summed over all times that the trial ran."""
    interruptions: tuple[str, ...] = ()
    """Epoch and reason of each interruption, such as `in epoch 3: its process died`; the trial then began again at its
    last checkpoint."""

    hardware: Mapping[str, str] = field(default_factory=dict)
    """Hardware of the workers that trained last, by kind; empty before the first epoch."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the last epoch; empty before the first."""
        return self.history[-1] if self.history else {}

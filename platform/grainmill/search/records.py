"""What is known of a trial."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from grainmill.config.space import Setting

State = Literal["running", "paused", "complete", "stopped", "failed"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the study knows it."""

    number: int
    state: State
    setting: Setting
    history: tuple[Mapping[str, float], ...]
    """Metrics of each epoch, the first epoch first; each with `epoch`."""
    times: tuple[int, ...]
    """When each epoch was reported, in milliseconds since 1970."""
    cause: str | None
    """Why it failed."""
    variants: Mapping[str, Mapping[str, float]]
    """Metrics of the trained network at other evaluation settings, by name; they cost no training."""
    cost: Mapping[str, float]
    """`cpu_seconds` and `gpu_seconds`, over all times that it ran."""
    interruptions: tuple[str, ...] = ()
    """Where and why it was cut short, such as `in epoch 3: its process died`; it began again at its last checkpoint."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the last epoch; empty before the first."""
        return self.history[-1] if self.history else {}

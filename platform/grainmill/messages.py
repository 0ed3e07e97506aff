"""Typed messages from the processes of a trial to the driver of its study; Ray Tune carries them as results."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_KEY = "message"


@dataclass(frozen=True)
class EpochReport:
    """Result of a finished epoch."""

    epoch: int
    """Number of finished epochs, from 1."""
    metrics: Mapping[str, float]
    variants: Mapping[str, Mapping[str, float]]
    """Metrics of the trained model at other evaluation settings, by name; empty before the last epoch."""
    hardware: Mapping[str, str] = field(default_factory=dict)
    """Hardware of the workers, by kind; with the first report of each start, otherwise empty."""


@dataclass(frozen=True)
class WorkersStarted:
    """A worker group has started on the trial, for the first time or again after a failure."""

    workers: int
    reservation: Any
    """The cluster resources that the group holds: a `grainmill.execution.placement.Reservation`."""


@dataclass(frozen=True)
class NodeLeaving:
    """The trial has saved its last step and leaves a node that is to be taken away."""


@dataclass(frozen=True)
class WaitingForResources:
    """The trial waits until the cluster has room for its workers."""

    missing: str
    """Description of the missing resources, for the user."""


@dataclass(frozen=True)
class TrialFailed:
    """The training has raised an error and is not repeated."""

    cause: str


Message = EpochReport | WorkersStarted | NodeLeaving | WaitingForResources | TrialFailed


def encode(message: Message) -> dict[str, Any]:
    """Pack a message for `ray.tune.report`.

    Tune flattens nested mappings and adds keys of its own. An object under a single key passes through unchanged.
    """
    return {_KEY: message}


def decode(result: Mapping[str, Any]) -> Message:
    """Unpack the message from a result of Tune."""
    message: Message = result[_KEY]
    return message

"""fit(): the training loop, a generator that yields one result an epoch.

Plain torch. Where a process group exists, every rank runs fit(): the ranks share each step, and what
comes out is what one process would get of it.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from multigrain.config.training import MultiGrainSpec, VariantSettings
from multigrain.data.dataset import Dataset
from multigrain.evaluation.held_out import held_out_grid
from multigrain.hooks import EndedError, Heartbeat, no_heartbeat
from multigrain.models import checkpoint
from multigrain.training.trainer import Training


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gave."""

    epoch: int
    """Epochs finished, from 1."""
    metrics: dict[str, float]
    """`held_out.METRICS`, and the course of the training, over all ranks."""
    variants: Mapping[str, dict[str, float]] = field(default_factory=dict)
    """After the last epoch, `held_out.METRICS` at each of `evaluation.variants`, by its name."""


def fit(
    spec: MultiGrainSpec,
    dataset: Dataset,
    folder: Path,
    device: torch.device | None = None,
    heartbeat: Heartbeat = no_heartbeat,
) -> Iterator[EpochResult]:
    """Train, evaluating after every epoch; checkpoints are written then and every so many steps.

    Goes on from the newest intact checkpoint below `folder`. Where that lies at the end of an epoch, its
    result comes again: its reader may have gone before it took note. A run that was interrupted anywhere
    and went on ends, on CPU, with the same bits as one that was not. The first rank yields a result when
    its checkpoint is safe.

    Args:
        spec: the settings; must be those of the checkpoints.
        dataset: the images.
        folder: for checkpoints; the same for all ranks, which must all see it.
        device: the current GPU, if there is one, by default.
        heartbeat: where it is True on any rank, all save a checkpoint at most a step later, and end.
    Yields:
        One result an epoch, the same on every rank but for the speed; the last has the variants.
    Raises:
        TrainingError: loss or weights are not finite.
        ValueError: the checkpoints are of other settings.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    training = Training(spec, dataset, device, heartbeat)
    _restore(training, folder)
    with closing(checkpoint.Writer(folder)) as writer:
        save = writer.save if training.rank == 0 else _leave
        for epoch in range(training.epoch, spec.epochs):
            if epoch > training.epoch:
                training.begin_epoch(epoch)
            metrics = training.train_epoch(save)
            if metrics is None:
                return
            wanted = spec.evaluation.variants if epoch + 1 == spec.epochs else VariantSettings()
            try:
                own, variants = held_out_grid(
                    training.result_network, dataset, spec, wanted, device, training.loaders, heartbeat
                )
            except EndedError:  # the next start evaluates again
                return
            writer.wait()
            yield EpochResult(epoch + 1, metrics | own, variants)


def _restore(training: Training, folder: Path) -> None:
    """Go on from the newest intact checkpoint, if there is one."""
    if saved := checkpoint.latest(folder):
        begun = MultiGrainSpec.model_validate(saved.state["spec"]), saved.state["classes"]
        if begun != (training.spec, list(training.dataset.classes)):
            raise ValueError(
                f"a run goes on with the settings and classes it began with, but {folder} holds others; use another"
            )
        training.restore(saved)


def _leave(_: checkpoint.Checkpoint) -> None:
    """The other ranks leave writing to the first."""

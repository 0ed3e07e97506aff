"""The training loop: `fit`, a generator that yields one result for each epoch.

With a process group, every rank runs `fit`: the ranks share each step, and the result is that of a single process.
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
from multigrain.training.trainer import Training, default_device


@dataclass(frozen=True)
class EpochResult:
    """Result of one epoch."""

    epoch: int
    """Number of epochs done."""
    metrics: dict[str, float]
    """Metrics of held-out images (`held_out.METRICS`) and statistics of the training, over all ranks."""
    variants: Mapping[str, dict[str, float]] = field(default_factory=dict)
    """After the last epoch, metrics at each of the settings `evaluation.variants`, by its name."""


def fit(
    spec: MultiGrainSpec,
    dataset: Dataset,
    folder: Path,
    device: torch.device | None = None,
    heartbeat: Heartbeat = no_heartbeat,
) -> Iterator[EpochResult]:
    """Train, evaluate after every epoch, and save checkpoints after epochs and every `compute.checkpoint_steps` steps.

    Training resumes from the newest intact checkpoint below `folder`. If that is the end of an epoch, the epoch's
    result is yielded again, as the caller may not have received it. A run that was interrupted anywhere and resumed
    ends, on CPU, with the same bits as an uninterrupted one. Rank 0 yields a result when its checkpoint is on disk.

    Args:
        spec: settings; must equal those of the checkpoints.
        dataset: images.
        folder: folder of the checkpoints, the same for all ranks and readable by all.
        device: by default the current GPU, or the CPU if there is none.
        heartbeat: if it returns True on any rank, all save a checkpoint at most one step later, and end.
    Yields:
        One result for each epoch, the same on every rank except for the speed; the last one has the variants.
    Raises:
        TrainingError: loss or weights are not finite.
        ValueError: the checkpoints have other settings or classes.
    """
    device = device or default_device()
    training = Training(spec, dataset, device, heartbeat)
    _restore(training, folder)
    with closing(checkpoint.Writer(folder)) as writer:
        save = writer.save if training.rank == 0 else _do_not_save
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
            except EndedError:  # the resumed run evaluates again
                return
            writer.wait()
            yield EpochResult(epoch + 1, metrics | own, variants)


def _restore(training: Training, folder: Path) -> None:
    """Resume from the newest intact checkpoint, if there is one."""
    if saved := checkpoint.latest(folder):
        first = MultiGrainSpec.model_validate(saved.state["spec"]), saved.state["classes"]
        if first != (training.spec, list(training.dataset.classes)):
            raise ValueError(
                f"a run goes on with the settings and classes it began with, but {folder} holds others; use another"
            )
        training.restore(saved)


def _do_not_save(_: checkpoint.Checkpoint) -> None:
    """Save nothing: on all ranks but 0."""

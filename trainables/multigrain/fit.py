"""fit(): the training loop, a generator that yields one result an epoch.

Plain torch. Where a process group exists, every rank runs fit(): the ranks share each batch, and
gradients are those of the whole batch; negatives come from a rank's own part of it.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from multigrain import checkpoint
from multigrain.augment import TrainTransform
from multigrain.batches import RepeatedAugmentationBatches
from multigrain.data import Dataset
from multigrain.evaluate import evaluate
from multigrain.losses import JointLoss, MarginLoss, alone, joint_loss
from multigrain.model import MultiGrain
from multigrain.optim import build_optimizer, set_epoch
from multigrain.sampling import sample_triplets
from multigrain.spec import LossSettings, MultiGrainSpec
from multigrain.views import TrainViews, Views, whole


class TrainingError(RuntimeError):
    """Training cannot go on, for example because the loss is not a number."""


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gave."""

    epoch: int
    """Epochs finished, from 1."""
    metrics: dict[str, float]
    """`evaluate.METRICS`, and the course of the training, over all ranks."""


def _average(x: Tensor) -> Tensor:
    """Mean over ranks; no gradient."""
    x = x.detach().clone()
    distributed.all_reduce(x)
    return x / distributed.get_world_size()


class Objective(nn.Module):
    """Network and losses as one module, so that beta's gradient is shared between ranks like any other."""

    def __init__(self, network: MultiGrain, settings: LossSettings) -> None:
        super().__init__()
        self.network = network
        self.margin = MarginLoss(settings.beta, settings.margin)
        self.settings = settings

    def forward(self, batch: Views, generator: torch.Generator) -> tuple[JointLoss, dict[str, Tensor]]:
        settings = self.settings
        output = self.network(batch.images)
        triplets = sample_triplets(
            output.descriptor.detach(),
            batch.instances,
            settings.negatives,
            generator,
            settings.cutoff,
            settings.nonzero_loss_cutoff,
        )
        average = _average if distributed.is_initialized() else alone
        margin, sums = self.margin(output.descriptor, triplets, average)
        return joint_loss(output.logits, batch.labels, margin, settings.weight), sums


class Training:
    """One run: what `fit` builds once and steps through."""

    def __init__(self, spec: MultiGrainSpec, dataset: Dataset, device: torch.device) -> None:
        self.spec, self.dataset, self.device = spec, dataset, device
        self.grouped = distributed.is_initialized()
        self.rank = distributed.get_rank() if self.grouped else 0
        world_size = distributed.get_world_size() if self.grouped else 1
        torch.manual_seed(spec.seed)
        network = MultiGrain(spec.model.trunk, len(dataset.classes), spec.model.p)
        # Channels last: 1.3 times the steps on CPU.
        self.objective = Objective(network, spec.loss).to(device).to(memory_format=torch.channels_last)
        self.network = self.objective.network
        self.batches = RepeatedAugmentationBatches(
            len(dataset.train),
            spec.batch.size,
            spec.batch.repeats,
            spec.batch.length_factor,
            self.rank,
            world_size,
            spec.seed,
        )
        step_size = self.batches.images_per_step * spec.batch.repeats
        beta = self.objective.margin.beta
        self.optimizer = build_optimizer(spec.optimizer, self.network.parameters(), beta, step_size)
        transform = TrainTransform(spec.augment, spec.image_size)
        self.views = TrainViews(dataset.train, dataset.train_labels, transform, spec.seed)
        self.step = DistributedDataParallel(self.objective) if self.grouped else self.objective

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One epoch of steps, counted from 0; means over its steps and all ranks."""
        spec = self.spec
        set_epoch(self.optimizer, epoch, spec.epochs, spec.optimizer.schedule)
        self.batches.set_epoch(epoch)
        self.views.epoch = epoch
        generator = torch.Generator(self.device).manual_seed(hash((spec.seed, epoch, self.rank)) % 2**63)
        loader = DataLoader(self.views, batch_sampler=self.batches, collate_fn=whole)
        self.step.train()
        totals: dict[str, Tensor] = {}
        started = time.perf_counter()
        for batch in loader:
            losses, sums = self.step(Views(*(tensor.to(self.device) for tensor in batch)), generator)
            self.optimizer.zero_grad()
            losses.loss.backward()
            self.optimizer.step()
            for name, value in (losses._asdict() | sums).items():
                totals[name] = totals.get(name, 0) + value.detach()
        seconds = time.perf_counter() - started
        if self.grouped:
            for buffer in self.network.buffers():  # every rank evaluates with the batch statistics that are saved
                distributed.broadcast(buffer, src=0)
        return self._summary(totals, epoch, seconds)

    def _summary(self, totals: dict[str, Tensor], epoch: int, seconds: float) -> dict[str, float]:
        values = torch.stack([total.float() for total in totals.values()])
        if self.grouped:
            values = _average(values)
        mean = dict(zip(totals, values.tolist(), strict=True))
        if not all(tensor.isfinite().all() for tensor in (values, *self.objective.parameters())):
            raise TrainingError(
                f"loss and weights must be finite, but were not in epoch {epoch + 1}; lower optimizer.rate"
            )
        triplets = max(mean["triplets"], 1)
        views = len(self.batches) * self.batches.images_per_step * self.spec.batch.repeats
        return {
            "loss": mean["loss"] / len(self.batches),
            "classification_loss": mean["classification"] / len(self.batches),
            "margin_loss": mean["margin"] / len(self.batches),
            "beta": self.objective.margin.beta.item(),
            "active_terms": mean["active"] / (2 * triplets),
            "positive_distance": mean["positive_distance"] / triplets,
            "negative_distance": mean["negative_distance"] / triplets,
            "views_per_second": views / seconds,
        }

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint: weights, beta and optimizer; all else follows from seed and epoch."""
        self.objective.load_state_dict(saved.model)
        self.optimizer.load_state_dict(saved.optimizer)

    def save(self, folder: Path, result: EpochResult) -> None:
        """Write a checkpoint below `folder`."""
        state = {
            "epoch": result.epoch,
            "metrics": result.metrics,
            "spec": self.spec.model_dump(),
            "classes": list(self.dataset.classes),
        }
        model, optimizer = self.objective.state_dict(), self.optimizer.state_dict()
        checkpoint.save(folder, checkpoint.Checkpoint(model, optimizer, state))


def fit(
    spec: MultiGrainSpec, dataset: Dataset, folder: Path, device: torch.device | None = None
) -> Iterator[EpochResult]:
    """Train, evaluating and saving a checkpoint after every epoch.

    Goes on from the newest intact checkpoint below `folder`, whose result then comes first, again: its
    reader may have gone before it took note. A run that was interrupted between epochs and went on
    ends, on CPU, with the same bits as one that was not.

    Args:
        spec: the settings; must be those of the checkpoints.
        dataset: the images.
        folder: for checkpoints; the same for all ranks, which must all see it.
        device: the current GPU, if there is one, by default.
    Yields:
        One result an epoch, the same on every rank.
    Raises:
        TrainingError: the loss is not finite.
        ValueError: the checkpoints are of other settings.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    training = Training(spec, dataset, device)
    done = 0
    if saved := checkpoint.latest(folder):
        if saved.state["spec"] != spec.model_dump() or saved.state["classes"] != list(dataset.classes):
            raise ValueError(
                f"a run goes on with the settings and classes it began with, but {folder} holds others; use another"
            )
        training.restore(saved)
        done = saved.state["epoch"]
        yield EpochResult(done, saved.state["metrics"])
    for epoch in range(done, spec.epochs):
        metrics = training.train_epoch(epoch)
        metrics |= evaluate(training.network, dataset, spec.image_size, device)
        result = EpochResult(epoch + 1, metrics)
        if training.rank == 0:
            training.save(folder, result)
        yield result

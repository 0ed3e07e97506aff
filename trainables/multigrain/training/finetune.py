"""Fine-tuning of the pooling exponent of a trained network for images of another size; all else stays as it is."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn import functional
from torch.optim import SGD
from torch.utils import data as torch_data

from multigrain.config.finetune import FinetuneSpec
from multigrain.data.dataset import Dataset, first_of_each_class
from multigrain.data.loading import read
from multigrain.data.transforms import evaluation_pixels, scale
from multigrain.distributed import StopSignal, rank_and_size
from multigrain.evaluation.held_out import held_out_metrics
from multigrain.hooks import EndedError, Heartbeat, no_heartbeat
from multigrain.models import checkpoint
from multigrain.models.multigrain import network_of
from multigrain.models.pooling import GeM
from multigrain.training.fit import EpochResult
from multigrain.training.trainer import TrainingError, default_device, loader_count

LARGEST = 100.0
"""Largest finite p that the settings of a network allow."""


def fit(
    spec: FinetuneSpec,
    dataset: Dataset,
    folder: Path,
    device: torch.device | None = None,
    heartbeat: Heartbeat = no_heartbeat,
) -> Iterator[EpochResult]:
    """Learn p by the cross-entropy of whole images at another size; evaluate and save a checkpoint after every epoch.

    The checkpoint is like that of a training; its settings hold the new p, with the size and the transform for which it
    was learnt. A run resumes from the newest intact checkpoint below `folder`, as that of `training.fit` does.

    Args:
        spec: settings; must equal those of the checkpoints in `folder`.
        dataset: images of the classes that the network knows.
        folder, device, heartbeat: as in `training.fit.fit`.
    Yields:
        One result for each epoch, the same on every rank: `held_out.METRICS`, `p`, and `loss`, the mean over the steps.
    Raises:
        FileNotFoundError: `spec.checkpoint` holds no intact checkpoint.
        TrainingError: loss or p are out of range.
        ValueError: the network knows other classes, or the checkpoints have other settings.
    """
    device = device or default_device()
    saved = checkpoint.latest(folder)
    if saved and saved.state.get("finetuning") != spec.model_dump():
        raise ValueError(
            f"a fine-tuning goes on with the settings it began with, but {folder} holds others; use another"
        )
    tuning, stop_signal = _Tuning(spec, dataset, saved or _trained(spec), device), StopSignal(heartbeat, device)
    done = 0
    with closing(checkpoint.Writer(folder)) as writer, suppress(EndedError):  # the resumed run evaluates again
        if saved:
            done = saved.state["epochs"]
            tuning.restore(saved)
            if tuning.step == 0:
                yield tuning.result(saved, heartbeat)
        for epoch in range(done, spec.epochs):
            whole = tuning.train_epoch(epoch, stop_signal)
            state = tuning.state(epoch + whole)
            if tuning.rank == 0:
                writer.save(state)
                writer.wait()
            if not whole:
                return
            yield tuning.result(state, heartbeat)


def _trained(spec: FinetuneSpec) -> checkpoint.Checkpoint:
    found = checkpoint.latest(Path(spec.checkpoint)) if spec.checkpoint else None
    if found is None:
        raise FileNotFoundError(
            f"fine-tuning needs a trained network, but checkpoint = {spec.checkpoint} holds no intact one; "
            "name the folder of a trial that has trained"
        )
    return found


def rate(spec: FinetuneSpec, done: float) -> float:
    """Learning rate after a share `done`, in [0, 1), of all steps [R]."""
    return spec.rate * (1 - done) ** spec.power


class _Images(torch_data.Dataset[tuple[Tensor, int]]):
    """Whole images, (3, h, w) uint8 with the larger side `size`, and their labels."""

    def __init__(self, files: Sequence[tuple[Path, int]], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        path, label = self.files[position]
        return evaluation_pixels(read(path), "rect", self.size), label


class _Tuning:
    """State of a fine-tuning: network, exponent, optimizer, images and position."""

    def __init__(
        self, spec: FinetuneSpec, dataset: Dataset, source: checkpoint.Checkpoint, device: torch.device
    ) -> None:
        self.spec, self.dataset, self.device = spec, dataset, device
        self.grouped = distributed.is_initialized()
        self.rank, self.world_size = rank_and_size()
        self.classes = source.state["classes"]
        if self.classes != list(dataset.classes):
            raise ValueError(
                f"the data must have the network's {len(self.classes)} classes, but have {len(dataset.classes)}, "
                f"not the same ones; use the data that {spec.checkpoint} was trained on"
            )
        network, settings = network_of(source)
        # In evaluation mode throughout, so that the statistics of batch normalisation stay, too.
        self.network = network.requires_grad_(False).eval()
        # The maximum has no gradient with respect to p: learning then starts from the published 3.
        start = float(network.pool.p) if math.isfinite(network.pool.p) else 3.0
        self.network.pool = GeM(min(max(1.0, start), LARGEST), learnable=True)
        self.network.to(device)
        (self.p,) = self.network.pool.parameters()
        self.optimizer = SGD([self.p], lr=spec.rate, momentum=spec.momentum)
        self.images = first_of_each_class(dataset, spec.images_per_class)
        shown = settings.evaluation.model_copy(update={"transform": "rect", "size": spec.image_size})
        self.settings = settings.model_copy(update={"evaluation": shown})
        self.loaders = loader_count(spec.loaders, device)
        self.step, self.loss = 0, 0.0
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)
        """Sum of the losses of this epoch's steps."""

    @property
    def steps(self) -> int:
        """Number of steps in one epoch."""
        return -(-len(self.images) // self.spec.batch_size)

    def train_epoch(self, epoch: int, stop_signal: StopSignal | None = None) -> bool:
        """Train the rest of an epoch, counted from 0; return False if `stop_signal` ended it early."""
        spec, stop_signal = self.spec, stop_signal or StopSignal(no_heartbeat, self.device)
        order = np.random.default_rng((spec.seed, epoch)).permutation(self.images).tolist()
        begins = range(self.step * spec.batch_size, len(order), spec.batch_size)
        steps = [order[begin : begin + spec.batch_size] for begin in begins]
        shares = [images[self.rank :: self.world_size] for images in steps]
        mine = [(self.dataset.train[index], self.dataset.train_labels[index]) for share in shares for index in share]
        images_one_by_one = _Images(mine, spec.image_size)  # every image has a shape of its own
        loader = torch_data.DataLoader(
            images_one_by_one, batch_size=None, num_workers=self.loaders, generator=torch.Generator()
        )
        views = iter(loader)
        for images, share in zip(steps, shares, strict=True):
            self.optimizer.param_groups[0]["lr"] = rate(spec, (epoch + self.step / self.steps) / spec.epochs)
            self.total += self._step(islice(views, len(share)), len(images))
            self.step += 1
            if stop_signal.after_step() and self.step < self.steps:
                return False
        self.loss = self.total.item() / self.steps
        self.step = 0
        self.total.zero_()
        p = self.p.item()
        if not (math.isfinite(self.loss) and math.isfinite(p) and p <= LARGEST):
            raise TrainingError(
                f"loss and p must be finite, and p at most {LARGEST:.0f}, but they were {self.loss} and {p} after "
                f"epoch {epoch + 1}; lower rate"
            )
        return True

    def _step(self, views: Iterable[tuple[Tensor, int]], count: int) -> Tensor:
        """Do one step over `count` images, of which `views` are this rank's, and return the loss over all."""
        self.p.grad = torch.zeros_like(self.p)
        loss = torch.zeros_like(self.p)
        for pixels, label in views:
            logits = self.network(scale(pixels[None].to(self.device))).logits
            term = functional.cross_entropy(logits, torch.tensor([label], device=self.device)) / count
            torch.autograd.backward(term)
            loss += term.detach()
        if self.grouped:
            distributed.all_reduce(self.p.grad)
            distributed.all_reduce(loss)
        self.optimizer.step()
        return loss

    def state(self, epochs: int) -> checkpoint.Checkpoint:
        """A checkpoint of the network with its new exponent, and of the state that resuming needs."""
        # Below 1, p counts as 1.
        model = self.settings.model.model_copy(update={"p": max(1.0, self.p.item()), "learn_p": False})
        weights = {
            checkpoint.NETWORK + name: tensor for name, tensor in self.network.state_dict().items() if name != "pool.p"
        }
        state = {
            "steps": epochs * self.steps + self.step,
            "epochs": epochs,
            "step": self.step,
            "total": self.total.item(),
            "p": self.p.item(),
            "loss": self.loss,
            "spec": self.settings.model_copy(update={"model": model}).model_dump(),
            "classes": self.classes,
            "orientation": "exif",
            "finetuning": self.spec.model_dump(),
        }
        return checkpoint.Checkpoint(weights, self.optimizer.state_dict(), state)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Resume from a checkpoint of this fine-tuning."""
        with torch.no_grad():
            self.p.fill_(saved.state["p"])
            self.total.fill_(saved.state["total"])
        self.step, self.loss = saved.state["step"], saved.state["loss"]
        self.optimizer.load_state_dict(saved.optimizer)

    def result(self, saved: checkpoint.Checkpoint, heartbeat: Heartbeat = no_heartbeat) -> EpochResult:
        """Result of an epoch: metrics of the network in its checkpoint."""
        network, settings = network_of(saved)
        metrics = held_out_metrics(
            network.to(self.device), self.dataset, settings, self.device, self.loaders, heartbeat
        )
        return EpochResult(saved.state["epochs"], {**metrics, "p": settings.model.p, "loss": saved.state["loss"]})

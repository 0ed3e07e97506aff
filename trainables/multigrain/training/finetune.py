"""Fine-tuning of the pooling exponent for images of another size: all else of a trained network stays as it is."""

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
from multigrain.data.loading import decode
from multigrain.data.transforms import evaluation_pixels, scale
from multigrain.distributed import StopSignal
from multigrain.evaluation.held_out import held_out_metrics
from multigrain.hooks import EndedError, Heartbeat, no_heartbeat
from multigrain.models import checkpoint
from multigrain.models.multigrain import network_of
from multigrain.models.pooling import GeM
from multigrain.training.fit import EpochResult
from multigrain.training.trainer import TrainingError

LARGEST = 100.0
"""Largest p that the settings of a network allow."""


def fit(
    spec: FinetuneSpec,
    dataset: Dataset,
    folder: Path,
    device: torch.device | None = None,
    heartbeat: Heartbeat = no_heartbeat,
) -> Iterator[EpochResult]:
    """Learn p by the cross-entropy of whole images at another size, evaluating and saving after every epoch.

    The result is a checkpoint like those of training, whose settings hold the new p, and the size and
    transform for which it was learnt. Goes on from the newest intact checkpoint below `folder`, which holds
    all that is needed; where that lies at the end of an epoch, its result comes again.

    Args:
        spec: the settings; must be those of the checkpoints in `folder`.
        dataset: of the classes that the network knows.
        folder: for checkpoints; the same for all ranks, which must all see it.
        device: the current GPU, if there is one, by default.
        heartbeat: where it is True on any rank, all save a checkpoint at most a step later, and end.
    Yields:
        One result an epoch, the same on every rank: `held_out.METRICS`, `p`, and `loss`, the mean over the steps.
    Raises:
        FileNotFoundError: there is no intact checkpoint to begin with.
        TrainingError: loss or p leave their range.
        ValueError: the network knows other classes, or the checkpoints are of other settings.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    saved = checkpoint.latest(folder)
    if saved and saved.state.get("finetuning") != spec.model_dump():
        raise ValueError(
            f"a fine-tuning goes on with the settings it began with, but {folder} holds others; use another"
        )
    tuning, ending = _Tuning(spec, dataset, saved or _trained(spec), device), StopSignal(heartbeat, device)
    done = 0
    with closing(checkpoint.Writer(folder)) as writer, suppress(EndedError):  # the next start evaluates again
        if saved:
            done = saved.state["epochs"]
            tuning.restore(saved)
            if tuning.step == 0:
                yield tuning.result(saved, heartbeat)
        for epoch in range(done, spec.epochs):
            whole = tuning.train_epoch(epoch, ending)
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
    """Learning rate where the share `done` of all steps, in [0, 1), lies behind [R]."""
    return spec.rate * (1 - done) ** spec.power


class _Images(torch_data.Dataset[tuple[Tensor, int]]):
    """Whole images, (3, h, w) uint8, larger side `size`, each with its label."""

    def __init__(self, files: Sequence[tuple[Path, int]], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        path, label = self.files[position]
        return evaluation_pixels(decode(path), "rect", self.size), label


class _Tuning:
    """What one fine-tuning builds once and steps through."""

    def __init__(
        self, spec: FinetuneSpec, dataset: Dataset, source: checkpoint.Checkpoint, device: torch.device
    ) -> None:
        self.spec, self.dataset, self.device = spec, dataset, device
        self.grouped = distributed.is_initialized()
        self.rank, self.world_size = (distributed.get_rank(), distributed.get_world_size()) if self.grouped else (0, 1)
        self.classes = source.state["classes"]
        if self.classes != list(dataset.classes):
            raise ValueError(
                f"the data must have the network's {len(self.classes)} classes, but have {len(dataset.classes)}, "
                f"not the same ones; use the data that {spec.checkpoint} was trained on"
            )
        network, settings = network_of(source)
        # In evaluation mode for good, so that the statistics of batch normalisation stay, too.
        self.network = network.requires_grad_(False).eval()
        # The maximum has no gradient with respect to p: it starts from the published 3.
        start = float(network.pool.p) if math.isfinite(network.pool.p) else 3.0
        self.network.pool = GeM(min(max(1.0, start), LARGEST), learnable=True)
        self.network.to(device)
        (self.p,) = self.network.pool.parameters()
        self.optimizer = SGD([self.p], lr=spec.rate, momentum=spec.momentum)
        self.images = first_of_each_class(dataset, spec.images_per_class)
        shown = settings.evaluation.model_copy(update={"transform": "rect", "size": spec.image_size})
        self.settings = settings.model_copy(update={"evaluation": shown})
        default = torch.get_num_threads() if device.type == "cuda" else 0
        self.loaders = default if spec.loaders is None else spec.loaders
        self.step, self.loss = 0, 0.0
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)
        """Of the losses of this pass's steps."""

    @property
    def steps(self) -> int:
        """In one pass over the images."""
        return -(-len(self.images) // self.spec.batch_size)

    def train_epoch(self, epoch: int, ending: StopSignal | None = None) -> bool:
        """What is left of one pass over the images, counted from 0; False where `ending` said before its end to end."""
        spec, ending = self.spec, ending or StopSignal(no_heartbeat, self.device)
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
            if ending.after_step() and self.step < self.steps:
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
        """One step of all ranks, over `count` images, of which `views` are this rank's; the loss of all."""
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
        """The network with its new exponent, as training would have left it, and what a later start needs."""
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
            "finetuning": self.spec.model_dump(),
        }
        return checkpoint.Checkpoint(weights, self.optimizer.state_dict(), state)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint of this fine-tuning."""
        with torch.no_grad():
            self.p.fill_(saved.state["p"])
            self.total.fill_(saved.state["total"])
        self.step, self.loss = saved.state["step"], saved.state["loss"]
        self.optimizer.load_state_dict(saved.optimizer)

    def result(self, saved: checkpoint.Checkpoint, heartbeat: Heartbeat = no_heartbeat) -> EpochResult:
        """What the network that is left is worth."""
        network, settings = network_of(saved)
        metrics = held_out_metrics(
            network.to(self.device), self.dataset, settings, self.device, self.loaders, heartbeat
        )
        return EpochResult(saved.state["epochs"], {**metrics, "p": settings.model.p, "loss": saved.state["loss"]})

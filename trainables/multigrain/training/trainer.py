"""A training run and its steps; `fit` drives it."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from multigrain.config.training import ComputeSettings, MultiGrainSpec
from multigrain.data.dataset import Dataset
from multigrain.data.loading import TrainViews, Views, training_batches
from multigrain.data.sampler import RepeatedAugmentationBatches
from multigrain.data.transforms import colour, paints, scale
from multigrain.distributed import StopSignal, mean_over_ranks, rank_and_size
from multigrain.hooks import Heartbeat, no_heartbeat
from multigrain.losses.joint import JointLoss, Step
from multigrain.models import checkpoint
from multigrain.models.multigrain import MultiGrain, freeze_batchnorm
from multigrain.models.weights import load_weights
from multigrain.training.optimizers import build_optimizers, rate_factor, set_rates, update_average

CHECK_STEPS = 100
"""Number of steps between two checks that the loss is finite, each of which waits for the device."""


class TrainingError(RuntimeError):
    """Training cannot go on, for example because the loss is not a number."""


def autocast_type(settings: ComputeSettings, device: torch.device) -> torch.dtype | None:
    """Number type in which the trunk computes; None means fp32."""
    if settings.precision != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    # On a CPU without matrix units for bf16, it is some ten times slower than fp32.
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else None


def default_device() -> torch.device:
    """The current GPU, or the CPU if there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def loader_count(wanted: int | None, device: torch.device) -> int:
    """Number of image-reading processes: as wanted, or by default one for each thread if a GPU computes, else none."""
    default = torch.get_num_threads() if device.type == "cuda" else 0
    return default if wanted is None else wanted


class _Encoder(nn.Module):
    """Images to embeddings: the part of the network whose gradients DistributedDataParallel averages over ranks."""

    def __init__(self, network: MultiGrain) -> None:
        super().__init__()
        self.trunk, self.pool = network.trunk, network.pool
        self._embed = network.embed

    def forward(self, images: Tensor) -> Tensor:
        return self._embed(images)


class Training:
    """State of a training run: network, losses, batches, optimizers and position."""

    def __init__(
        self, spec: MultiGrainSpec, dataset: Dataset, device: torch.device, heartbeat: Heartbeat = no_heartbeat
    ) -> None:
        self.spec, self.dataset, self.device, self.stop_signal = spec, dataset, device, StopSignal(heartbeat, device)
        self.grouped = distributed.is_initialized()
        self.rank, world_size = rank_and_size()
        batch = spec.batch
        self.batches = RepeatedAugmentationBatches(
            len(dataset.train), batch.size, batch.repeats, batch.length_factor, self.rank, world_size, spec.seed
        )
        self.views_per_step = self.batches.images_per_step * batch.repeats
        self.loss = JointLoss(self._network(), spec).to(device).to(memory_format=torch.channels_last)
        self.network = self.loss.network
        self.averaged = copy.deepcopy(self.network).requires_grad_(False) if spec.optimizer.ema else None
        if spec.compute.compile:
            self.network.trunk.compile()
        encoder = _Encoder(self.network)
        self.encoder = DistributedDataParallel(encoder) if self.grouped else encoder
        self.optimizers = build_optimizers(spec.optimizer, self.network, self.loss.margin.beta, self.views_per_step)
        self.autocast = autocast_type(spec.compute, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast is torch.float16)
        self.views = TrainViews(dataset.train, dataset.train_labels, spec.augment, spec.image_size, spec.seed)
        self.instances = torch.tensor(dataset.instances)
        self.loaders = loader_count(spec.compute.loaders, device)
        self.loader = training_batches(self.views, self.batches, self.loaders, device.type == "cuda")
        self.begin_epoch(0)

    def _network(self) -> MultiGrain:
        settings = self.spec.model
        torch.manual_seed(self.spec.seed)
        network = MultiGrain(settings.trunk, len(self.dataset.classes), settings.p, settings.learn_p)
        load_weights(network.trunk, settings.trunk, settings.weights)
        if settings.batchnorm == "frozen":
            freeze_batchnorm(network)
        elif settings.batchnorm == "sync" and self.grouped:
            if self.device.type != "cuda":
                raise TrainingError("model.batchnorm: sync needs GPUs, got CPU workers; set it to local")
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return network

    @property
    def result_network(self) -> MultiGrain:
        """The network that is evaluated and saved as the result: the averaged one, if there is one."""
        return self.averaged or self.network

    @property
    def steps(self) -> int:
        """Number of steps done in all epochs."""
        return self.epoch * len(self.batches) + self.step

    def begin_epoch(self, epoch: int) -> None:
        """Move to the first step of an epoch, counted from 0."""
        self.epoch, self.step = epoch, 0
        self.totals: dict[str, Tensor] = {}
        self.seconds = self.waited = 0.0
        self._first_bad = torch.full((), torch.inf, device=self.device)

    def train_epoch(self, save: Callable[[checkpoint.Checkpoint], None]) -> dict[str, float] | None:
        """Train the rest of the epoch, saving checkpoints; return its statistics, or None if a heartbeat stopped it."""
        self.batches.load_state_dict({"seed": self.spec.seed, "epoch": self.epoch, "step": self.step})
        self.views.set_epoch(self.epoch)
        self.loss.train()
        remaining = range(self.step, len(self.batches))
        loader: Iterator[Views] = iter(self.loader) if remaining else iter(())
        for step in remaining:
            started = time.perf_counter()
            batch = next(loader)
            self.waited += time.perf_counter() - started
            self._train_step(batch)
            self.step = step + 1
            self.seconds += time.perf_counter() - started
            if self.step % CHECK_STEPS == 0:
                self._check()
            stops, last = self.stop_signal.after_step(), self.step == len(self.batches)
            if last or stops or self.steps % self.spec.compute.checkpoint_steps == 0:
                save(self._checkpoint())
            if stops and not last:
                return None
        return self._statistics()

    def _train_step(self, batch: Views) -> None:
        spec, position = self.spec, (self.spec.seed, self.epoch, self.step)
        factor = rate_factor(self.epoch + self.step / len(self.batches), spec.epochs, spec.optimizer)
        set_rates(self.optimizers, factor)
        images = batch.images.to(self.device, non_blocking=True), batch.colour.to(self.device, non_blocking=True)
        parts = list(zip(*(tensor.chunk(spec.batch.accumulate) for tensor in images), strict=True))
        embeddings = self._embed_parts(parts, position)
        whole_step = torch.from_numpy(self.batches.images(self.step)).repeat_interleave(spec.batch.repeats)
        own = spec.loss.negatives_from == "rank"
        generator = torch.Generator(self.device).manual_seed(_seed(*position, self.rank + 1 if own else 0))
        scale = self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else 1.0
        gradients, values = self.loss.backward(
            torch.cat([embedding.detach() for embedding in embeddings]),
            Step(batch.labels, self.instances[whole_step]),
            generator,
            scale,
        )
        self._backward_parts(parts, embeddings, gradients, position)
        self._update()
        bad = torch.where(values["loss"].isfinite(), torch.inf, float(self.step + 1))
        self._first_bad = torch.minimum(self._first_bad, bad)
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value.double()

    def _embed(self, part: tuple[Tensor, Tensor], seeds: tuple[int, ...]) -> Tensor:
        torch.default_generator.manual_seed(_seed(*seeds, self.rank))  # for a trunk with dropout
        if self.device.type == "cuda":
            torch.cuda.manual_seed(_seed(*seeds, self.rank))
        images = colour(*part) if paints(self.spec.augment) else scale(part[0])
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.encoder(images)

    def _embed_parts(self, parts: list[tuple[Tensor, Tensor]], position: tuple[int, ...]) -> list[Tensor]:
        if len(parts) == 1:
            return [self._embed(parts[0], (*position, 0))]
        # Without a graph: each part passes once more when its gradient is known. Batch statistics count once.
        statistics = [buffer.clone() for buffer in self.network.buffers()]
        with torch.no_grad():
            embeddings = [self._embed(part, (*position, index)) for index, part in enumerate(parts)]
        for buffer, before in zip(self.network.buffers(), statistics, strict=True):
            buffer.copy_(before)
        return embeddings

    def _backward_parts(
        self,
        parts: list[tuple[Tensor, Tensor]],
        embeddings: list[Tensor],
        gradients: Tensor,
        position: tuple[int, ...],
    ) -> None:
        if len(parts) == 1:
            torch.autograd.backward(embeddings[0], gradients)
            return
        for index, (part, gradient) in enumerate(zip(parts, gradients.chunk(len(parts)), strict=True)):
            last = index == len(parts) - 1
            silent = isinstance(self.encoder, DistributedDataParallel) and not last
            with self.encoder.no_sync() if silent else nullcontext():  # type: ignore[operator]
                torch.autograd.backward(self._embed(part, (*position, index)), gradient)

    def _update(self) -> None:
        if self.grouped:  # the encoder's gradients are averaged already
            for parameter in self.loss.head:
                if parameter.grad is not None:  # the classifier has none where loss.weight is 0
                    parameter.grad.copy_(mean_over_ranks(parameter.grad))
        if self.spec.optimizer.clip:
            self.scaler.unscale_(self.optimizers[0])
            nn.utils.clip_grad_norm_(self.network.parameters(), self.spec.optimizer.clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        if self.averaged is not None:
            update_average(self.averaged, self.network, self.spec.optimizer.ema, self.steps)

    def _check(self) -> None:
        first = self._first_bad.clone()
        if self.grouped:
            distributed.all_reduce(first, distributed.ReduceOp.MIN)
        if first.isfinite():
            raise TrainingError(
                f"the loss must be finite, but was not in step {int(first)} of epoch {self.epoch + 1}; "
                "lower optimizer.rate, or set optimizer.clip"
            )

    def _checkpoint(self) -> checkpoint.Checkpoint:
        """State that the rest of the run depends on, the same on all ranks."""
        self._check()
        if not all(parameter.isfinite().all() for parameter in self.loss.parameters()):
            raise TrainingError(
                f"weights must be finite, but were not after step {self.step} of epoch {self.epoch + 1}; "
                "lower optimizer.rate, or set optimizer.clip"
            )
        if self.grouped:
            self.totals = {name: mean_over_ranks(total) for name, total in self.totals.items()}
            for buffer in self.result_network.buffers():  # every rank evaluates with the saved statistics
                distributed.broadcast(buffer, src=0)
        model = self.loss.state_dict()
        if self.averaged is not None:
            model |= {checkpoint.AVERAGED + name: tensor for name, tensor in self.averaged.state_dict().items()}
        main, beta = (optimizer.state_dict() for optimizer in self.optimizers)
        state = {
            "steps": self.steps,
            "epoch": self.epoch,
            "step": self.step,
            "totals": {name: total.item() for name, total in self.totals.items()},
            "seconds": self.seconds,
            "waited": self.waited,
            "spec": self.spec.model_dump(),
            "classes": list(self.dataset.classes),
            "orientation": "exif",  # how images are decoded
        }
        return checkpoint.Checkpoint(model, {"network": main, "beta": beta, "scaler": self.scaler.state_dict()}, state)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Resume from a checkpoint; all that it does not hold follows from seed, epoch and step."""
        state = saved.state
        self.loss.load_state_dict(
            {key: value for key, value in saved.model.items() if not key.startswith(checkpoint.AVERAGED)}
        )
        if self.averaged is not None:
            self.averaged.load_state_dict(saved.part(checkpoint.AVERAGED))
        for optimizer, name in zip(self.optimizers, ("network", "beta"), strict=True):
            optimizer.load_state_dict(saved.optimizer[name])
        self.scaler.load_state_dict(saved.optimizer["scaler"])
        self.begin_epoch(state["epoch"])
        self.step, self.seconds, self.waited = state["step"], state["seconds"], state["waited"]
        self.totals = {
            name: torch.tensor(total, dtype=torch.float64, device=self.device)
            for name, total in state["totals"].items()
        }

    def _statistics(self) -> dict[str, float]:
        """Statistics of the epoch: means over its steps and all ranks."""
        mean = {name: total.item() for name, total in self.totals.items()}
        steps, triplets = len(self.batches), max(mean["triplets"], 1)
        statistics = {
            "loss": mean["loss"] / steps,
            "classification_loss": mean["classification"] / steps,
            "margin_loss": mean["margin"] / steps,
            "classification_gradient": mean["classification_gradient"] / steps,
            "beta": self.loss.margin.beta.item(),
            "active_terms": mean["active"] / (2 * triplets),
            "positive_distance": mean["positive_distance"] / triplets,
            "negative_distance": mean["negative_distance"] / triplets,
            "fallback_rows": mean["fallback"] / mean["anchors"],
            "views_per_second": steps * self.views_per_step / self.seconds,
            "data_wait": self.waited / self.seconds,
        }
        if self.spec.model.learn_p:
            statistics["p"] = torch.as_tensor(self.network.pool.p).item()
        if self.spec.loss.entropy:
            statistics["entropy_loss"] = mean["entropy"] / steps
        return statistics


def _seed(*parts: int) -> int:
    """A different seed for every position."""
    return hash(parts) % 2**63

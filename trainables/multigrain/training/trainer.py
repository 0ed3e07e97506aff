"""One training run: what `fit` builds once and steps through."""

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
from multigrain.distributed import StopSignal, mean_over_ranks
from multigrain.hooks import Heartbeat, no_heartbeat
from multigrain.losses.joint import JointLoss, Step
from multigrain.models import checkpoint
from multigrain.models.multigrain import MultiGrain, freeze_batchnorm
from multigrain.models.weights import load_weights
from multigrain.training.optimizers import build_optimizers, follow, rate_factor, set_rates

CHECK_STEPS = 100
"""Steps between two looks at whether the loss is still finite: each look waits for the device."""


class TrainingError(RuntimeError):
    """Training cannot go on, for example because the loss is not a number."""


def autocast_type(settings: ComputeSettings, device: torch.device) -> torch.dtype | None:
    """The type that the trunk computes in; None for fp32."""
    if settings.precision != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    # bf16 on a CPU without matrix units for it is some ten times slower than fp32.
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else None


class _Encoder(nn.Module):
    """Images to embeddings: the part of the network whose gradients the ranks share while they are computed."""

    def __init__(self, network: MultiGrain) -> None:
        super().__init__()
        self.trunk, self.pool = network.trunk, network.pool
        self._embed = network.embed

    def forward(self, images: Tensor) -> Tensor:
        return self._embed(images)


class Training:
    """Network, losses, batches, optimizers and the position of one run."""

    def __init__(
        self, spec: MultiGrainSpec, dataset: Dataset, device: torch.device, heartbeat: Heartbeat = no_heartbeat
    ) -> None:
        self.spec, self.dataset, self.device, self.stop_signal = spec, dataset, device, StopSignal(heartbeat, device)
        self.grouped = distributed.is_initialized()
        self.rank = distributed.get_rank() if self.grouped else 0
        world_size = distributed.get_world_size() if self.grouped else 1
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
        cuda = device.type == "cuda"
        loaders = spec.compute.loaders
        self.loaders = (torch.get_num_threads() if cuda else 0) if loaders is None else loaders
        self.loader = training_batches(self.views, self.batches, self.loaders, cuda)
        self.epoch = self.step = 0
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
        """What is evaluated and kept: the averaged network, if there is one."""
        return self.averaged or self.network

    @property
    def steps(self) -> int:
        """Steps done in all."""
        return self.epoch * len(self.batches) + self.step

    def begin_epoch(self, epoch: int) -> None:
        """Stand before the first step of an epoch, counted from 0."""
        self.epoch, self.step = epoch, 0
        self.totals: dict[str, Tensor] = {}
        self.seconds = self.waited = 0.0
        self._first_bad = torch.full((), torch.inf, device=self.device)

    def train_epoch(self, save: Callable[[checkpoint.Checkpoint], None]) -> dict[str, float] | None:
        """What is left of the epoch, saved at intervals and at the end; its course, None if a heartbeat ended it."""
        self.batches.load_state_dict({"seed": self.spec.seed, "epoch": self.epoch, "step": self.step})
        self.views.set_epoch(self.epoch)
        self.loss.train()
        left = range(self.step, len(self.batches))
        loader: Iterator[Views] = iter(self.loader) if left else iter(())
        for step in left:
            started = time.perf_counter()
            batch = next(loader)
            self.waited += time.perf_counter() - started
            self._train_step(batch)
            self.step = step + 1
            self.seconds += time.perf_counter() - started
            if self.step % CHECK_STEPS == 0:
                self._check()
            ends, last = self.stop_signal.after_step(), self.step == len(self.batches)
            if last or ends or self.steps % self.spec.compute.checkpoint_steps == 0:
                save(self._checkpoint())
            if ends and not last:
                return None
        return self._course()

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
        # Without memory of how: each part passes once more when its gradient is known. Statistics count once.
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
        if self.grouped:  # what stands behind the encoder
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
            follow(self.averaged, self.network, self.spec.optimizer.ema, self.steps)

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
        """All that the rest of the run depends on, the same on all ranks."""
        self._check()
        if not all(parameter.isfinite().all() for parameter in self.loss.parameters()):
            raise TrainingError(
                f"weights must be finite, but were not after step {self.step} of epoch {self.epoch + 1}; "
                "lower optimizer.rate, or set optimizer.clip"
            )
        if self.grouped:
            self.totals = {name: mean_over_ranks(total) for name, total in self.totals.items()}
            for buffer in self.result_network.buffers():  # every rank evaluates with the statistics that are saved
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
        }
        return checkpoint.Checkpoint(model, {"network": main, "beta": beta, "scaler": self.scaler.state_dict()}, state)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint; what it does not hold follows from seed, epoch and step."""
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

    def _course(self) -> dict[str, float]:
        """How the epoch went: means over its steps and all ranks."""
        mean = {name: total.item() for name, total in self.totals.items()}
        steps, triplets = len(self.batches), max(mean["triplets"], 1)
        course = {
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
            course["p"] = torch.as_tensor(self.network.pool.p).item()
        if self.spec.loss.entropy:
            course["entropy_loss"] = mean["entropy"] / steps
        return course


def _seed(*parts: int) -> int:
    """A seed of one's own for every position."""
    return hash(parts) % 2**63

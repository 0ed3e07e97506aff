"""Every setting of a MultiGrain training run, each default with its source.

Sources: [P] the paper, arXiv:1902.05509v2, with the equation, table or figure; [R] the behaviour
of the authors' released code where the paper is silent; [-] our own choice.
The defaults together are *the paper's setting*: lambda 0.5, p 3, three copies, `full` augmentation.
"""

import difflib
import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, lt=1)]

TRUNKS = (
    "narrow",
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)
"""Trunks besides those of timm."""
TIMM = "timm/"
"""Prefix of the trunks that the library timm builds."""


class Settings(BaseModel):
    """A frozen group of settings: unknown keys, wrong types and NaN are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _trunk(name: str) -> str:
    known: list[str] = [*TRUNKS]
    if name.startswith(TIMM):
        try:
            import timm
        except ModuleNotFoundError:
            raise ValueError(
                f"a trunk of timm needs the library, got {name!r}; install it by `pip install grainmill[timm]`"
            ) from None
        known = [TIMM + model for model in timm.list_models()]
        if timm.is_model(name.removeprefix(TIMM)):
            return name
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TRUNKS)}, timm/<name>"
    raise ValueError(f"must be a known trunk, got {name!r}; {hint}")


def _exponent(p: float) -> float:
    if not (1 <= p <= 100 or p == math.inf):
        raise ValueError(f"must lie in [1, 100] or be .inf, got {p}; the paper has 1 and 3")
    return p


Exponent = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_exponent)]


def _weights(source: str) -> str:
    return source if source in {"random", "zoo"} else str(Path(source).absolute())


class ModelSettings(Settings):
    """The network."""

    trunk: Annotated[str, AfterValidator(_trunk)] = "resnet50"
    """Network before the pooling [P Table 2: resnet50]: `narrow` for 32-pixel images, a ResNet, ResNeXt or Wide
    ResNet of torchvision, or `timm/<name>` for a convolutional network of timm."""
    weights: Annotated[str, AfterValidator(_weights)] = "random"
    """The trunk's first weights: `random` [R], `zoo` for the published ImageNet weights, or a file (safetensors, or a
    state dict that torch loads without running code)."""
    p: Exponent = 3.0
    """GeM exponent while training, up to 100, or .inf for the maximum [P eq. 1, Table 2: 1 or 3]."""
    learn_p: bool = False
    """Whether p learns with the network [P: fixed]."""
    batchnorm: Literal["local", "sync", "frozen"] = "local"
    """Statistics of batch normalisation: each worker's own [R], of all workers, or those that `weights` brought."""

    @model_validator(mode="after")
    def _learnable(self) -> Self:
        if self.learn_p and math.isinf(self.p):
            raise ValueError("p can learn from a finite value only, got model.p = .inf; set model.p to 3, for example")
        return self


class LossSettings(Settings):
    """The two losses and their mix."""

    weight: Probability = 0.5
    """lambda, the weight of cross-entropy; the margin loss gets 1 - lambda [P eq. 5, Fig. 2]."""
    margin: Positive = 0.2
    """alpha, half the gap asked for between positive and negative distances [P Table B.1]."""
    beta: Positive = 1.2
    """Starting value of the learnable boundary between positive and negative distances [P Table B.1]."""
    normalise: Literal["active", "triplets", "pairs"] = "active"
    """What the margin terms are divided by: the terms above zero [after Wu et al.], the triplets that have one
    [R on torch 1.2 and newer], or all terms [P eq. 5]."""
    negatives: Literal["distance_weighted", "uniform", "reference"] = "distance_weighted"
    """How the negative of a pair is drawn among the other images [P, after Wu et al.]. `reference` does so in the
    released code's arithmetic, which underflows to `uniform` in wide networks [R]."""
    negatives_from: Literal["step", "rank"] = "step"
    """The views that a negative is drawn from: all of the step, so that the number of workers changes nothing [-], or
    those on the same worker [R]."""
    cutoff: Positive = 0.5
    """Distances below this weigh as if they were this [R]."""
    nonzero_loss_cutoff: Positive = 1.4
    """Negatives farther than this are not drawn while nearer ones exist [R]."""
    dimension: int = Field(0, ge=0)
    """Dimension of the sphere whose distances `distance_weighted` evens out: lower is softer; 0: the descriptor's."""
    entropy: NotNegative = 0.0
    """Weight of the entropy regulariser, which spreads descriptors evenly for copy detection [-, after SSCD]."""


class BatchSettings(Settings):
    """Repeated-augmentation batches."""

    size: int = Field(504, ge=1)
    """Views in one step over all workers. The paper's 512 does not hold whole groups of 3; 504 does."""
    repeats: int = Field(3, ge=1)
    """m, the augmented copies of each image in its batch [P: 3]."""
    length_factor: Positive = 2.0
    """Views in one epoch, as a multiple of the number of images [R: 2]."""
    accumulate: int = Field(1, ge=1)
    """Parts in which a step passes through the network, to save memory; pairs are drawn from all of the step [-]."""

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        unit = self.repeats * self.accumulate
        if self.size % unit:
            raise ValueError(
                f"batch.size must be a multiple of batch.repeats x batch.accumulate, got {self.size} and "
                f"{self.repeats} x {self.accumulate}; set batch.size to {_nearest_multiple(self.size, unit)}"
            )
        return self


class AugmentSettings(Settings):
    """The random transform of a training view."""

    policy: Literal["full", "autoaugment", "senet", "torch", "copy"] = "full"
    """`torch`: crop and flip. `full`: also jitter and lighting. `senet`: as `full` with two thirds of the jitter.
    `autoaugment`: `torch` and AutoAugment [P Table C.1]. `copy`: `full`, rotation, blur and JPEG [-]."""
    crop: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of the image's area that a random crop keeps [P Table C.1: 0.08]."""
    ratio: Annotated[float, Field(ge=1)] = 4 / 3
    """Largest aspect ratio of a random crop; its inverse is the smallest [P Table C.1]."""
    flip: Probability = 0.5
    """Probability of a horizontal flip [P Table C.1]."""
    brightness: Strength = 0.3
    """Strength of brightness jitter, in `full`, `senet` and `copy` [P Table C.1: 0.3]."""
    contrast: Strength = 0.3
    """Strength of contrast jitter, likewise [P Table C.1: 0.3]."""
    saturation: Strength = 0.3
    """Strength of saturation jitter, likewise [P Table C.1: 0.3]."""
    lighting: Probability = 0.1
    """Standard deviation of the PCA lighting noise, in `full`, `senet` and `copy` [P Table C.1: 0.1]."""
    grey: Probability = 0.0
    """Probability of a grey view, in every policy [-]."""
    randaugment: int = Field(0, ge=0, le=30)
    """Magnitude of RandAugment's two operations, in every policy; 0 is off [-]."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 15.0
    """Largest rotation in degrees, either way, in `copy` [-]."""
    blur: Probability = 0.3
    """Probability of a Gaussian blur, in `copy` [-]."""
    jpeg: Probability = 0.3
    """Probability of a JPEG compression, in `copy` [-]."""
    mixup: NotNegative = 0.0
    """alpha of mixup between the embeddings that the classifier reads; the margin loss does not; 0 is off [-]."""


class OptimizerSettings(Settings):
    """SGD or AdamW, and the schedule of the rates."""

    algorithm: Literal["sgd", "adamw"] = "sgd"
    """Of the network [R: sgd]; beta always has SGD."""
    rate: Positive = 0.2
    """Learning rate for 512 views a step; scaled with the batch size [R]. For `adamw`, 0.001 or so."""
    beta_rate: Positive = 0.1
    """Learning rate of beta for 512 views a step [P Table B.1]."""
    momentum: Strength = 0.9
    """Of SGD, and AdamW's first moment [R]."""
    weight_decay: NotNegative = 1e-4
    """On every parameter of the network [R], but neither on p nor on beta."""
    decay_all: bool = True
    """Whether normalisation layers and biases decay too [R]."""
    schedule: Literal["step", "cosine"] = "step"
    """`step`: a tenth at 1/4, 1/2 and 3/4 of the epochs [P Fig. A.1: at 30, 60, 90 of 120]. `cosine`: down to 0 [-]."""
    warmup: NotNegative = 0.0
    """Epochs in which the rates climb from 0 [R: none]."""
    clip: NotNegative = 0.0
    """Largest norm of the network's gradient; 0 is off [-]."""
    ema: Strength = 0.0
    """Decay, a step, of the averaged weights that are evaluated and kept; 0 is off [-]."""

    @model_validator(mode="after")
    def _rate_suits(self) -> Self:
        if self.algorithm == "adamw" and self.rate > 0.05:
            raise ValueError(
                f"adamw diverges at rates above 0.05, got optimizer.rate = {self.rate}; set it to 0.001, for example"
            )
        return self


class VariantSettings(Settings):
    """A grid of other settings at which a trained network is evaluated, at the end: they cost no training."""

    sizes: Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(strict=False)] = ()
    """s*, in pixels, beside the network's own; at these, images are shown whole [P Table 2: 224, 500, 800]."""
    exponents: Annotated[tuple[Exponent, ...], Field(strict=False)] = ()
    """p*, beside the network's own [P section 3.5: 3 to 5]."""
    whiten: bool = False
    """Whether each is measured with whitened descriptors, too; fitted on 20,000 training images or fewer [R]."""


class EvaluationSettings(Settings):
    """How held-out images are shown to the network, after each epoch and by the trained model."""

    transform: Literal["crop", "rect"] = "crop"
    """`crop`: the central square after scaling the smaller side to 256/224 of it. `rect`: the whole image, its larger
    side scaled to the size [R]."""
    size: int | None = Field(None, ge=16)
    """s*, in pixels; `image_size` by default [P Table 2: 224, 500, 800]."""
    variants: VariantSettings = VariantSettings()


class ComputeSettings(Settings):
    """How the machine is used; the method is the same."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the trunk while training. `auto`: bf16 where the hardware multiplies it fast, else fp32."""
    compile: bool = False
    """Whether torch compiles the network: a minute or more at the start, faster steps then."""
    loaders: int | None = Field(None, ge=0)
    """Processes of a worker that read images; as many as its CPUs where a GPU computes, none otherwise by default."""
    checkpoint_steps: int = Field(1000, ge=1)
    """Steps between checkpoints inside an epoch; there is one after every epoch, too."""


class MultiGrainSpec(Settings):
    """One training run of MultiGrain."""

    image_size: int = Field(224, ge=16)
    """s, side of the square training crops, in pixels [P Table 2: 224]."""
    epochs: int = Field(120, ge=1)
    """Passes; each holds `batch.length_factor` times as many views as there are images [P Fig. A.1: 120]."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the weights, the batches, the augmentation and the sampled negatives [-]."""
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    batch: BatchSettings = BatchSettings()
    augment: AugmentSettings = AugmentSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    compute: ComputeSettings = ComputeSettings()

    @model_validator(mode="after")
    def _margin_loss_needs_copies(self) -> Self:
        if self.batch.repeats == 1 and self.loss.weight != 1:
            raise ValueError(
                f"loss.weight must be 1 where batch.repeats is 1, got {self.loss.weight}: the margin loss compares "
                "copies of one image; set loss.weight to 1 or batch.repeats to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.optimizer.warmup >= self.epochs:
            raise ValueError(
                f"optimizer.warmup must be shorter than epochs, got {self.optimizer.warmup} of {self.epochs}; lower it"
            )
        return self

    @property
    def evaluation_size(self) -> int:
        """s*, in pixels."""
        return self.evaluation.size or self.image_size


def _nearest_multiple(size: int, unit: int) -> int:
    return max(1, round(size / unit)) * unit


def worker_problems(spec: MultiGrainSpec, workers: int) -> list[str]:
    """What keeps `spec` from running on `workers` ranks, in words; empty if nothing does."""
    batch = spec.batch
    unit = batch.repeats * batch.accumulate * workers
    if batch.size % unit == 0:
        return []
    return [
        f"batch.size must be a multiple of batch.repeats x batch.accumulate x workers, got {batch.size} and "
        f"{batch.repeats} x {batch.accumulate} x {workers}; set batch.size to {_nearest_multiple(batch.size, unit)}"
    ]

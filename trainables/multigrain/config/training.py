"""Settings of a MultiGrain training run; each description names the source of the default.

Sources: [P] the paper, arXiv:1902.05509v2, with the equation, table or figure; [R] the authors' released code where the
paper does not say; [-] our own choice. The defaults together are *the paper's setting*: lambda 0.5, p 3, three copies
of each image, `full` augmentation.
"""

import difflib
import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from multigrain.config.paths import absolute

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
"""Names of the trunks that need no further library."""
TIMM = "timm/"
"""Prefix of the names of trunks that the library timm builds."""


class Settings(BaseModel):
    """Base of all groups of settings: frozen; unknown keys, wrong types and NaN are errors."""

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
    return source if source in {"random", "zoo"} else absolute(source)


class ModelSettings(Settings):
    """Settings of the network."""

    trunk: Annotated[str, AfterValidator(_trunk)] = "resnet50"
    """Network that computes the feature map: `narrow` for images of about 32 pixels, a ResNet, ResNeXt or Wide ResNet
    of torchvision, or `timm/<name>` for a convolutional network of timm [P Table 2: resnet50]."""
    weights: Annotated[str, AfterValidator(_weights)] = "random"
    """Initial weights of the trunk: `random` [R], `zoo` for the published ImageNet weights, or the path of a file
    (safetensors, or a state dict that torch loads without running code)."""
    p: Exponent = 3.0
    """GeM pooling exponent in training, from 1 (average) to 100, or .inf (maximum) [P eq. 1, Table 2: 1 or 3]."""
    learn_p: bool = False
    """If true, p is learnt together with the weights, starting from `model.p` [P: fixed]."""
    batchnorm: Literal["local", "sync", "frozen"] = "local"
    """Statistics of batch normalisation: `local` to each worker [R], `sync` over all workers (needs GPUs), or `frozen`
    to those that `weights` brought."""

    @model_validator(mode="after")
    def _learnable(self) -> Self:
        if self.learn_p and math.isinf(self.p):
            raise ValueError("p can learn from a finite value only, got model.p = .inf; set model.p to 3, for example")
        return self


class LossSettings(Settings):
    """Settings of the two losses and their weights."""

    weight: Probability = 0.5
    """lambda, the weight of cross-entropy, from 0 to 1; the margin loss has the weight 1 - lambda [P eq. 5, Fig. 2]."""
    margin: Positive = 0.2
    """alpha: copies should lie closer than beta - alpha, other images farther than beta + alpha [P Table B.1]."""
    beta: Positive = 1.2
    """Initial value of beta, the learnable boundary between distances of copies and of other images [P Table B.1]."""
    normalise: Literal["active", "triplets", "pairs"] = "active"
    """Count that the sum of the margin terms is divided by: terms above zero (`active`) [after Wu et al.], triplets
    with such a term [R on torch 1.2 and newer], or all terms (`pairs`) [P eq. 5]."""
    negatives: Literal["distance_weighted", "uniform", "reference"] = "distance_weighted"
    """Distribution from which the negative of a pair is drawn [P, after Wu et al.]. `reference` is `distance_weighted`
    in the released code's arithmetic, which underflows to `uniform` in networks with many channels [R]."""
    negatives_from: Literal["step", "rank"] = "step"
    """Views from which a negative is drawn: all views of the `step`, so that the number of workers makes no difference
    [-], or the views on the same worker (`rank`) [R]."""
    cutoff: Positive = 0.5
    """Distance below which `distance_weighted` no longer raises the weight of a negative [R]."""
    nonzero_loss_cutoff: Positive = 1.4
    """Largest distance at which a negative is drawn, as long as there are nearer ones [R]."""
    dimension: int = Field(0, ge=0)
    """Dimension of the sphere that `distance_weighted` assumes; a lower one spreads the draws; 0: the descriptor's."""
    entropy: NotNegative = 0.0
    """Weight of the entropy loss, which spreads descriptors evenly for copy detection; 0 is off [-, after SSCD]."""


class BatchSettings(Settings):
    """Settings of the repeated-augmentation batches."""

    size: int = Field(504, ge=1)
    """Number of views in one step over all workers. The paper's 512 is not a multiple of 3 copies; 504 is."""
    repeats: int = Field(3, ge=1)
    """m, the number of augmented copies of each image in its batch [P: 3]."""
    length_factor: Positive = 2.0
    """Number of views in one epoch, as a multiple of the number of training images [R: 2]."""
    accumulate: int = Field(1, ge=1)
    """Number of parts in which a step passes the network, to save memory; pairs come from the whole step [-]."""

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        unit = self.repeats * self.accumulate
        if self.size % unit:
            nearest = _nearest_multiple(self.size, unit, self.repeats)
            raise ValueError(
                f"batch.size must be a multiple of batch.repeats x batch.accumulate, got {self.size} and "
                f"{self.repeats} x {self.accumulate}; set batch.size to {nearest}"
            )
        return self


class AugmentSettings(Settings):
    """Settings of the random transform of a training view."""

    policy: Literal["full", "autoaugment", "senet", "torch", "copy"] = "full"
    """Set of transforms. `torch`: crop and flip. `full`: `torch`, colour jitter and lighting. `senet`: `full` with two
    thirds of the jitter. `autoaugment`: `torch` and AutoAugment [P Table C.1]. `copy`: `full`, rotation, blur and JPEG
    compression [-]."""
    crop: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of the image's area that a random crop keeps, up to 1 [P Table C.1: 0.08]."""
    ratio: Annotated[float, Field(ge=1)] = 4 / 3
    """Largest aspect ratio of a random crop, from 1; the smallest is its inverse [P Table C.1]."""
    flip: Probability = 0.5
    """Probability of a horizontal flip [P Table C.1]."""
    brightness: Strength = 0.3
    """Strength of brightness jitter from 0 to 1, in `full`, `senet` and `copy` [P Table C.1: 0.3]."""
    contrast: Strength = 0.3
    """Strength of contrast jitter from 0 to 1, in `full`, `senet` and `copy` [P Table C.1: 0.3]."""
    saturation: Strength = 0.3
    """Strength of saturation jitter from 0 to 1, in `full`, `senet` and `copy` [P Table C.1: 0.3]."""
    lighting: Probability = 0.1
    """Standard deviation of the PCA lighting noise, in `full`, `senet` and `copy` [P Table C.1: 0.1]."""
    grey: Probability = 0.0
    """Probability that a view is turned grey, in every policy [-]."""
    randaugment: int = Field(0, ge=0, le=30)
    """Magnitude of RandAugment (two operations), from 1 to 30, in every policy; 0 is off [-]."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 15.0
    """Largest rotation in either direction, in degrees, in `copy` [-]."""
    blur: Probability = 0.3
    """Probability of Gaussian blur, in `copy` [-]."""
    jpeg: Probability = 0.3
    """Probability of JPEG compression, in `copy` [-]."""
    mixup: NotNegative = 0.0
    """alpha of mixup between the embeddings that the classifier reads, not those of the margin loss; 0 is off [-]."""


class OptimizerSettings(Settings):
    """Settings of the optimizer and the schedule of the learning rates."""

    algorithm: Literal["sgd", "adamw"] = "sgd"
    """Optimizer of the network [R: sgd]; beta is always optimized by SGD."""
    rate: Positive = 0.2
    """Learning rate for 512 views in a step; it is scaled by `batch.size` / 512 [R]. For `adamw` about 0.001."""
    beta_rate: Positive = 0.1
    """Learning rate of beta for 512 views in a step, scaled likewise [P Table B.1]."""
    momentum: Strength = 0.9
    """Momentum of SGD, or decay of AdamW's first moment, from 0 to 1 [R]."""
    weight_decay: NotNegative = 1e-4
    """Weight decay of all parameters of the network [R], except p; beta has none."""
    decay_all: bool = True
    """If false, the weights of normalisation layers and the biases do not decay [R: they do]."""
    schedule: Literal["step", "cosine"] = "step"
    """Course of the learning rates. `step`: divided by 10 at 1/4, 1/2 and 3/4 of the epochs [P Fig. A.1: at 30, 60 and
    90 of 120]. `cosine`: falling to 0 [-]."""
    warmup: NotNegative = 0.0
    """Number of epochs at the start in which the learning rates rise from 0 [R: none]."""
    clip: NotNegative = 0.0
    """Largest norm to which the network's gradient is clipped; 0 is off [-]."""
    ema: Strength = 0.0
    """Decay per step of a running average of the weights, which then is evaluated and saved; 0 is off [-]."""

    @model_validator(mode="after")
    def _rate_suits(self) -> Self:
        if self.algorithm == "adamw" and self.rate > 0.05:
            raise ValueError(
                f"adamw diverges at rates above 0.05, got optimizer.rate = {self.rate}; set it to 0.001, for example"
            )
        return self


class VariantSettings(Settings):
    """Grid of further settings at which the trained network is evaluated after the last epoch."""

    sizes: Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(strict=False)] = ()
    """Further values of s*, in pixels; images are then shown whole (`rect`) [P Table 2: 224, 500, 800]."""
    exponents: Annotated[tuple[Exponent, ...], Field(strict=False)] = ()
    """Further values of p*, the pooling exponent [P section 3.5: 3 to 5]."""
    whiten: bool = False
    """If true, each setting is also measured with whitened descriptors, fitted on up to 20,000 training images [R]."""


class EvaluationSettings(Settings):
    """Settings of the evaluation after each epoch, which the trained model uses too."""

    transform: Literal["crop", "rect"] = "crop"
    """Part of an image that the network is shown. `crop`: central square, after scaling the smaller side to 256/224 of
    the size. `rect`: whole image, its larger side scaled to the size [R]."""
    size: int | None = Field(None, ge=16)
    """s*, image size in evaluation, in pixels; `image_size` by default [P Table 2: 224, 500, 800]."""
    variants: VariantSettings = VariantSettings()


class ComputeSettings(Settings):
    """Settings of the hardware use, which do not change the method."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the trunk while training. `auto`: bf16 if the hardware multiplies it fast, else fp32."""
    compile: bool = False
    """If true, torch compiles the network, which takes a minute or more at the start and makes steps faster."""
    loaders: int | None = Field(None, ge=0)
    """Number of image-reading processes of a worker; by default as many as its CPUs if it has a GPU, else none."""
    checkpoint_steps: int = Field(1000, ge=1)
    """Number of steps between checkpoints within an epoch; there is one after every epoch, too."""


class MultiGrainSpec(Settings):
    """Settings of a MultiGrain training run."""

    image_size: int = Field(224, ge=16)
    """s, side of the square training crops, in pixels [P Table 2: 224]."""
    epochs: int = Field(120, ge=1)
    """Number of epochs; each has `batch.length_factor` times as many views as there are images [P Fig. A.1: 120]."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Random seed of the weights, the batches, the augmentation and the sampled negatives [-]."""
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
    def _margin_loss_needs_other_images(self) -> Self:
        batch = self.batch
        if batch.size == batch.repeats > 1 and self.loss.weight != 1:
            raise ValueError(
                f"batch.size must be at least twice batch.repeats where loss.weight is below 1, got {batch.size} and "
                f"{batch.repeats}: a step shows one image, and the margin loss compares it with others; set batch.size "
                f"to {2 * batch.repeats} or more"
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
        """Image size in evaluation, s*, in pixels."""
        return self.evaluation.size or self.image_size


def _nearest_multiple(size: int, unit: int, repeats: int) -> int:
    """Return the multiple of `unit` that is nearest to a batch size, with two images or more."""
    return max(unit, 2 * repeats, round(size / unit) * unit)


def worker_problems(spec: MultiGrainSpec, workers: int) -> list[str]:
    """Return messages on what keeps `spec` from running on `workers` ranks; empty if nothing does."""
    batch = spec.batch
    unit = batch.repeats * batch.accumulate * workers
    if batch.size % unit:
        nearest = _nearest_multiple(batch.size, unit, batch.repeats)
        return [
            f"batch.size must be a multiple of batch.repeats x batch.accumulate x workers, got {batch.size} and "
            f"{batch.repeats} x {batch.accumulate} x {workers}; set batch.size to {nearest}"
        ]
    if spec.loss.negatives_from == "rank" and spec.loss.weight != 1 and batch.size == batch.repeats * workers:
        return [
            "batch.size must be at least twice batch.repeats x workers where negatives come from the same rank, got "
            f"{batch.size} and {batch.repeats} x {workers}: each worker shows one image; raise it"
        ]
    return []

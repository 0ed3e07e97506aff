"""Every setting of a MultiGrain training run, each default with its source.

Sources: [P] the paper, arXiv:1902.05509v2, with the equation, table or figure; [R] the behaviour
of the authors' released code where the paper is silent; [-] our own choice.
The defaults together are *the paper's setting*: lambda 0.5, p 3, three copies, `full` augmentation.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """A frozen group of settings: unknown keys, wrong types and NaN are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSettings(Settings):
    """The network."""

    trunk: Literal["narrow", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """Network before the pooling [P Table 2: resnet50]. `narrow` suits 32-pixel images: its map is 4 x 4 there."""
    p: float = Field(3.0, ge=1, le=100)
    """GeM exponent while training [P eq. 1, Table 2: 1 or 3]."""


class LossSettings(Settings):
    """The two losses and their mix."""

    weight: Probability = 0.5
    """lambda, the weight of cross-entropy; the margin loss gets 1 - lambda [P eq. 5, Fig. 2]."""
    margin: Positive = 0.2
    """alpha, half the gap asked for between positive and negative distances [P Table B.1]."""
    beta: Positive = 1.2
    """Starting value of the learnable boundary between positive and negative distances [P Table B.1]."""
    negatives: Literal["distance_weighted", "uniform"] = "distance_weighted"
    """How the negative of a pair is drawn among the other images of the batch [P, after Wu et al.]."""
    cutoff: Positive = 0.5
    """Distances below this weigh as if they were this [R]."""
    nonzero_loss_cutoff: Positive = 1.4
    """Negatives farther than this are not drawn while nearer ones exist [R]."""


class BatchSettings(Settings):
    """Repeated-augmentation batches."""

    size: int = Field(504, ge=1)
    """Views in one step over all workers. The paper's 512 does not hold whole groups of 3; 504 does."""
    repeats: int = Field(3, ge=1)
    """m, the augmented copies of each image in its batch [P: 3]."""
    length_factor: Positive = 2.0
    """Views in one epoch, as a multiple of the number of images [R: 2]."""

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        if self.size % self.repeats:
            raise ValueError(
                f"batch.size must be a multiple of batch.repeats, got {self.size} and {self.repeats}; "
                f"set batch.size to {_nearest_multiple(self.size, self.repeats)}"
            )
        return self


class AugmentSettings(Settings):
    """The random transform of a training view."""

    policy: Literal["full", "torch", "copy"] = "full"
    """`torch`: crop and flip. `full` [P Table C.1]: also jitter and lighting. `copy`: also rotation, blur and JPEG."""
    crop: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of the image's area that a random crop keeps [P Table C.1: 0.08]."""
    flip: Probability = 0.5
    """Probability of a horizontal flip [P Table C.1]."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Strength of brightness, contrast and saturation jitter, in `full` and `copy` [P Table C.1: 0.3]."""
    lighting: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Standard deviation of the PCA lighting noise, in `full` and `copy` [P Table C.1: 0.1]."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 15.0
    """Largest rotation in degrees, either way, in `copy` [-]."""


class OptimizerSettings(Settings):
    """SGD and its schedule."""

    rate: Positive = 0.2
    """Learning rate for 512 views a step; scaled with the batch size [R]."""
    beta_rate: Positive = 0.1
    """Learning rate of beta for 512 views a step [P Table B.1]."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD, for the network and for beta [R]."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """On every parameter of the network, none on beta [R]."""
    schedule: Literal["step", "cosine"] = "step"
    """`step`: a tenth at 1/4, 1/2 and 3/4 of the epochs [P Fig. A.1: at 30, 60, 90 of 120]. `cosine`: down to 0 [-]."""


class MultiGrainSpec(Settings):
    """One training run of MultiGrain."""

    image_size: int = Field(224, ge=16)
    """Side of the square training and evaluation crops, in pixels [P Table 2: 224]."""
    epochs: int = Field(120, ge=1)
    """Passes; each holds `batch.length_factor` times as many views as there are images [P Fig. A.1: 120]."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the weights, the batches, the augmentation and the sampled negatives [-]."""
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    batch: BatchSettings = BatchSettings()
    augment: AugmentSettings = AugmentSettings()
    optimizer: OptimizerSettings = OptimizerSettings()

    @model_validator(mode="after")
    def _margin_loss_needs_copies(self) -> Self:
        if self.batch.repeats == 1 and self.loss.weight != 1:
            raise ValueError(
                f"loss.weight must be 1 where batch.repeats is 1, got {self.loss.weight}: the margin loss compares "
                "copies of one image; set loss.weight to 1 or batch.repeats to 2 or more"
            )
        return self


def _nearest_multiple(size: int, unit: int) -> int:
    return max(1, round(size / unit)) * unit


def worker_problems(spec: MultiGrainSpec, workers: int) -> list[str]:
    """What keeps `spec` from running on `workers` ranks, in words; empty if nothing does."""
    unit = spec.batch.repeats * workers
    if spec.batch.size % unit == 0:
        return []
    return [
        f"batch.size must be a multiple of batch.repeats x workers, got {spec.batch.size} and "
        f"{spec.batch.repeats} x {workers}; set batch.size to {_nearest_multiple(spec.batch.size, unit)}"
    ]

"""Fine-tuning of p*, the pooling exponent for images of another size, as the mill sees it.

The trained network stays as it is; only p learns (the released code's recipe [R]; the paper picks p* by hand).
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from multigrain.config.training import NotNegative, Positive, Settings, Strength
from multigrain.data.folders import DataSettings
from multigrain.heartbeat import Beat, undisturbed
from multigrain.trainable import (  # noqa: F401 - all but its settings and how it is done is that of training
    Data,
    Evaluation,
    data_problems,
    evaluate,
    example,
    export,
    images,
    images_of,
    load,
    metrics,
    prepare,
    sources,
)

if TYPE_CHECKING:
    from multigrain.training.fit import EpochResult


class Spec(Settings):
    """One fine-tuning of p*."""

    checkpoint: Annotated[str, AfterValidator(lambda path: str(Path(path).absolute()))] | None = None
    """Folder with the checkpoints of the trained network, such as `grainmill-runs/demo/run-1/trials/final-0000`."""
    image_size: int = Field(500, ge=16)
    """s*, in pixels: the larger side of the images, which are not cropped [R; P Table 2: 500 or 800]."""
    epochs: int = Field(1, ge=1)
    """Passes over the images [R: 1]."""
    images_per_class: int = Field(50, ge=1)
    """Training images of each class, the first by name [R: 50]."""
    batch_size: int = Field(4, ge=1)
    """Images in a step over all workers [R: 4]."""
    rate: Positive = 0.005
    """Learning rate of p at the start [R]."""
    power: NotNegative = 0.9
    """The rate falls as (1 - share of the steps that are done) to this power [R: 0.9]."""
    momentum: Strength = 0.9
    """Of SGD [R]."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the order of the images [-]."""
    loaders: int | None = Field(None, ge=0)
    """Processes of a worker that read images; as many as its CPUs where a GPU computes, none otherwise by default."""


def worker_problems(spec: Spec, workers: int) -> list[str]:
    """What keeps `spec` from running on `workers` ranks, in words; empty if nothing does."""
    problems = []
    # The manifest is written last: where it is, a checkpoint is whole. Whether it is intact is found when it is read.
    if spec.checkpoint is None or not glob.glob("step-*/MANIFEST.json", root_dir=spec.checkpoint):
        problems.append(
            f"checkpoint must be a folder with the checkpoints of a trained network, got {spec.checkpoint}; "
            "name that of a trial, such as grainmill-runs/demo/run-1/trials/final-0000"
        )
    if spec.batch_size % workers:
        problems.append(
            f"batch_size must be a multiple of the workers, got {spec.batch_size} and {workers}; change one of them"
        )
    return problems


def fit(spec: Spec, data: DataSettings, folder: Path, beat: Beat = undisturbed) -> Iterator["EpochResult"]:
    """Fine-tune p on prepared data; see `multigrain.training.finetune.fit`."""
    import multigrain.training.finetune

    return multigrain.training.finetune.fit(spec, images_of(data), folder, beat=beat)

"""Settings of the fine-tuning of p*, the pooling exponent for images of another size."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from multigrain.config.training import NotNegative, Positive, Settings, Strength


class FinetuneSpec(Settings):
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

"""Settings of the fine-tuning of p*, the pooling exponent for images of another size."""

from pydantic import Field

from multigrain.config.paths import PathText
from multigrain.config.training import NotNegative, Positive, Settings, Strength


class FinetuneSpec(Settings):
    """Settings of a fine-tuning of p*, the pooling exponent."""

    checkpoint: PathText | None = None
    """Folder with the checkpoints of a trained network, such as `grainmill-runs/demo/run-1/trials/final-0000`."""
    image_size: int = Field(500, ge=16)
    """s*, larger side of the images, in pixels; they are not cropped [R; P Table 2: 500 or 800]."""
    epochs: int = Field(1, ge=1)
    """Number of passes over the images [R: 1]."""
    images_per_class: int = Field(50, ge=1)
    """Number of training images used of each class, the first by name [R: 50]."""
    batch_size: int = Field(4, ge=1)
    """Number of images in one step over all workers [R: 4]."""
    rate: Positive = 0.005
    """Initial learning rate of p [R]."""
    power: NotNegative = 0.9
    """Power of the decay of the learning rate, rate x (1 - share of steps done) ^ power [R: 0.9]."""
    momentum: Strength = 0.9
    """Momentum of SGD, from 0 to 1 [R]."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Random seed of the order of the images [-]."""
    loaders: int | None = Field(None, ge=0)
    """Number of image-reading processes of a worker; by default as many as its CPUs if it has a GPU, else none."""

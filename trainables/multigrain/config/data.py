"""Settings of the training images: their source, and the share that is held out."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from multigrain.config.paths import CachePath, PathText
from multigrain.config.training import Positive, Settings


class DataSettings(Settings):
    """Source of the training images: a folder, a manifest, or built-in images that are written to disk."""

    builtin: Literal["digits", "shapes"] | None = None
    """Built-in images. `digits`: 1,797 scans of handwritten digits. `shapes`: drawn shapes of any size and number."""
    folder: PathText | None = None
    """Folder with `train/<class>/`, `val/<class>/` and, optionally, `copies/`; or just with `<class>/`, then split by
    file name. It can be s3://bucket/prefix."""
    manifest: PathText | None = None
    """CSV file with the columns `image`, `class` and, optionally, `role` and `instance_id`. The file and its images can
    be s3://bucket/key."""
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each class that is held out if the folder has no `val/`, or the manifest no `role`."""
    skip_broken: bool = False
    """Leave out images that cannot be used, and list them, instead of refusing the data."""
    image_size: int = Field(96, ge=16, le=4096)
    """Width and height of the `shapes`, in pixels."""
    images: int = Field(600, ge=20)
    """Number of `shapes`."""
    cache: CachePath = "~/.cache/grainmill"
    """Folder for copies of s3:// sources, shared by all processes of a machine."""
    cache_limit: Positive | None = None
    """GB that `cache` may hold, by default half of the disk. Sources that no running process uses are deleted to make
    room, the least recently used first."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = (self.builtin, self.folder, self.manifest)
        if (found := sum(source is not None for source in sources)) != 1:
            raise ValueError(
                f"data needs exactly one of `builtin`, `folder` and `manifest`, got {found}; name a folder of images, "
                "or `builtin: digits`"
            )
        return self

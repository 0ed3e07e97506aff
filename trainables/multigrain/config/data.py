"""Settings of the training images: where they are, and how many are held out."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from multigrain.config.training import Positive, Settings


class DataSettings(Settings):
    """Where the images are: a folder or a list of one's own, or a built-in source that is written to disk."""

    builtin: Literal["digits", "shapes"] | None = None
    """`digits`: 1,797 scans of handwritten digits. `shapes`: drawn coloured shapes of any size and number."""
    folder: str | None = None
    """`train/<class>/`, `val/<class>/` and, optionally, `copies/`; or just `<class>/`, then split by file name.
    It can be s3://bucket/prefix."""
    manifest: str | None = None
    """A CSV file with the columns `image`, `class` and, optionally, `role` and `instance_id`. It and its images can be
    s3://bucket/key."""
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each class held out where the folder has no `val/`, or the manifest no `role`."""
    skip_broken: bool = False
    """Whether images that cannot be used are left out, counted and listed, instead of being errors."""
    image_size: int = Field(96, ge=16, le=4096)
    """Side of the `shapes`, in pixels."""
    images: int = Field(600, ge=20)
    """Number of `shapes`."""
    cache: str = "~/.cache/grainmill"
    """Folder for what is read from s3://, shared by all processes of a machine."""
    cache_limit: Positive | None = None
    """GB that it may hold, half of the disk by default; what no running process reads makes room, the latest last."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = (self.builtin, self.folder, self.manifest)
        if (found := sum(source is not None for source in sources)) != 1:
            raise ValueError(
                f"data needs exactly one of `builtin`, `folder` and `manifest`, got {found}; name a folder of images, "
                "or `builtin: digits`"
            )
        return self

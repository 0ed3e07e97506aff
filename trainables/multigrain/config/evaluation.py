"""Settings of an evaluation on benchmarks: which ones, and at which sizes, exponents and whitenings."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from multigrain.config.training import Positive, Settings

BENCHMARKS = (
    "imagenet",
    "holidays",
    "holidays-upright",
    "ukbench",
    "copydays",
    "oxford5k",
    "paris6k",
    "roxford5k",
    "rparis6k",
    "disc21",
    "manifest",
)
"""Names of the benchmarks that can be read from disk."""

Size = Annotated[int, Field(ge=16)]


Exponent = Annotated[float, Field(ge=1, allow_inf_nan=True)]


PROXY = "proxy"
"""Stands for the exponent that the proxy task chose."""


def _known(on: dict[str, str]) -> dict[str, str]:
    if strangers := [name for name in on if name not in BENCHMARKS]:
        raise ValueError(f"benchmarks must be among {', '.join(BENCHMARKS)}, got {', '.join(strangers)}")
    return on


def _served(p: float | str) -> float | str:
    if p == PROXY or (isinstance(p, float) and p >= 1):
        return p
    raise ValueError(f"must be a number from 1 on, or the word {PROXY}, got {p!r}; the paper has 3 to 5")


class Serve(Settings):
    """The setting at which a copy of the model is kept for its users."""

    size: Size
    """s*, in pixels; it joins the grid."""
    p: Annotated[Annotated[float, Field(allow_inf_nan=True)] | str, AfterValidator(_served)]
    """p*, which joins the grid, or `proxy`: the one that the proxy task chose for this size."""
    whitened: bool = False
    """Whether descriptors are whitened, by the whitening of this size and exponent."""


class Evaluation(Settings):
    """Benchmarks, and the grid of settings at which a network is evaluated on them."""

    on: Annotated[dict[str, str], Field(min_length=1), AfterValidator(_known)]
    """Benchmark -> its folder; `manifest` -> its file. These and all folders below can be s3://bucket/prefix."""
    sizes: Annotated[tuple[Size, ...], Field(min_length=1, strict=False)] | None = None
    """s*, in pixels; the network's own by default [P Table 2: 224, 500, 800]."""
    exponents: Annotated[tuple[Exponent, ...], Field(min_length=1, strict=False)] | None = None
    """p*; the network's own by default [P section 3.5: 3 to 5]."""
    whiten: str | None = None
    """Folder of images, or text file with the path of one in each line, on which a whitening is fitted for each size
    and exponent; none by default [R: 20,000]."""
    dimension: int | None = Field(None, ge=1)
    """Directions that a whitening keeps, those of the largest variance; all by default [R]."""
    proxy: str | None = None
    """Folder of training images by class, `train/<class>/` or `<class>/`, on copies of which p* is chosen among the
    exponents for each size; none by default [P section 3.5]."""
    serve: Serve | None = None
    """The setting at which a copy of the model is kept for its users, such as `{size: 500, p: 4, whitened: true}`, with
    `proxy` for p* as the proxy task chose it; none by default."""
    cache: str = "~/.cache/grainmill"
    """Folder for what is read from s3://, shared by all processes of a machine."""
    cache_limit: Positive | None = None
    """GB that it may hold, half of the disk by default; what no running process reads makes room, the latest last."""
    loaders: int = Field(0, ge=0)
    """Processes that read images."""

    @model_validator(mode="after")
    def _needs(self) -> Self:
        problems = []
        if self.dimension is not None and self.whiten is None:
            problems.append(f"dimension must come with whiten, got {self.dimension} alone; name a folder in whiten")
        if self.serve and self.serve.whitened and self.whiten is None:
            problems.append("serve.whitened must come with whiten, got it alone; name a folder in whiten")
        if self.serve and self.serve.p == PROXY and self.proxy is None:
            problems.append(f"serve.p = {PROXY} must come with proxy, got it alone; name a folder in proxy")
        if problems:
            raise ValueError("\n".join(problems))
        return self

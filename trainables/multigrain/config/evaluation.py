"""Settings of an evaluation on benchmarks."""

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from multigrain.config.paths import CachePath, PathText
from multigrain.config.training import Positive, Settings

_PRECISIONS = tuple(f"mp-at-{rank}" for rank in (1, 5, 10))
QUERY_MEASURES: Mapping[str, tuple[str, ...]] = {
    "imagenet": ("top1", "top5"),
    "holidays": ("map", "map_finite"),
    "holidays-upright": ("map", "map_finite"),
    "ukbench": ("ukb",),
    "copydays": ("map", "map_finite"),
    "oxford5k": ("map", "map_finite"),
    "paris6k": ("map", "map_finite"),
    "roxford5k": ("map", "map_finite", *_PRECISIONS),
    "rparis6k": ("map", "map_finite", *_PRECISIONS),
    "disc21": ("recall-at-1",),
    "manifest": ("map", "map_finite", "map-at-r", "recall-at-1", "recall-at-10"),
}
"""Benchmarks that can be read from disk, with the measures that have a value for each query, as MLflow names them."""
BENCHMARKS = tuple(QUERY_MEASURES)

Size = Annotated[int, Field(ge=16)]
Exponent = Annotated[float, Field(ge=1, allow_inf_nan=True)]
PROXY = "proxy"
"""Word for the exponent that the proxy task chooses."""


def _known(on: dict[str, str]) -> dict[str, str]:
    if unknown := [name for name in on if name not in BENCHMARKS]:
        raise ValueError(f"benchmarks must be among {', '.join(BENCHMARKS)}, got {', '.join(unknown)}")
    return on


def _served(p: float | str) -> float | str:
    if p == PROXY or (isinstance(p, float) and p >= 1):
        return p
    raise ValueError(f"must be a number from 1 on, or the word {PROXY}, got {p!r}; the paper has 3 to 5")


class Serve(Settings):
    """Setting at which a copy of the model is stored for its users."""

    size: Size
    """Image size s*, in pixels; it is added to the grid."""
    p: Annotated[Annotated[float, Field(allow_inf_nan=True)] | str, AfterValidator(_served)]
    """Pooling exponent p*, which is added to the grid, or `proxy`: the exponent that the proxy task chooses for this
    size."""
    whitened: bool = False
    """Whiten descriptors with the whitening of this size and exponent."""


class Evaluation(Settings):
    """Benchmarks, and the sizes, exponents and whitening at which a network is evaluated on them."""

    on: Annotated[dict[str, PathText], Field(min_length=1), AfterValidator(_known)]
    """Folder of each benchmark, or file of a `manifest`. These and all folders below can be s3://bucket/prefix."""
    sizes: Annotated[tuple[Size, ...], Field(min_length=1, strict=False)] | None = None
    """Image sizes s*, in pixels; by default the network's own [P Table 2: 224, 500, 800]."""
    exponents: Annotated[tuple[Exponent, ...], Field(min_length=1, strict=False)] | None = None
    """Pooling exponents p*; by default the network's own [P section 3.5: 3 to 5]."""
    whiten: PathText | None = None
    """Images on which a whitening is fitted for each size and exponent: a folder, or a text file with one path in each
    line; by default no whitening [R: 20,000 images]."""
    dimension: int | None = Field(None, ge=1)
    """Number of directions that a whitening keeps, those of the largest variance; by default all [R]."""
    proxy: PathText | None = None
    """Folder of training images by class, `train/<class>/` or `<class>/`. On augmented copies of them, p* is chosen
    among the exponents for each size; by default p* is not chosen [P section 3.5]."""
    serve: Serve | None = None
    """Setting at which a copy of the model is stored for its users, such as `{size: 500, p: 4, whitened: true}`; p can
    be `proxy`, the choice of the proxy task. By default no copy is stored."""
    cache: CachePath = "~/.cache/grainmill"
    """Folder for copies of files from s3://, shared by all processes of a machine."""
    cache_limit: Positive | None = None
    """Largest size of the cache in GB; by default half of the disk. Files that no running process uses are removed for
    new ones, the least recently used first."""
    loaders: int = Field(0, ge=0)
    """Number of processes that read images; with 0, the evaluating process reads them."""

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

"""Sections of the experiment file, and the function that reads and checks one."""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, PrivateAttr, TypeAdapter, ValidationError, create_model

from grainmill import trainable as catalog
from grainmill.config import validation
from grainmill.config.resources import Resources
from grainmill.config.section import Section
from grainmill.config.space import Parameter, ScalarField, completed, nested
from grainmill.config.yaml_document import Document, Overrides
from grainmill.storage.mirror import S3Files

NotNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Search(Section):
    """Sampler, early stopping and number of trials."""

    sampler: Literal["tpe", "gp", "nsga2", "qmc", "random", "grid"] = "tpe"
    """Optuna's sampler; or `grid`: every setting of a space of `choice` and `int`, once."""
    scheduler: Literal["asha", "none"] = "asha"
    """`asha` stops the weaker trials early, judged by all objectives; the first trial always runs to its end."""
    trials: int = Field(20, ge=1)
    """Number of trials; the first has the published defaults."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the sampler."""
    grace_epochs: int | None = Field(None, ge=1)
    """Epochs before a trial can be stopped; a third of `base.epochs` by default."""
    reduction: int = Field(3, ge=2)
    """Reduction factor of `asha`: at each rung, one trial out of this number goes on."""
    stratify: str | None = None
    """A searched parameter, such as `batch.repeats`; at a rung, only trials with the same value of it are compared."""
    losers: Literal["stop", "pause"] = "stop"
    """Fate of the weaker trials. With `pause`, a trial that is among the best of its rung later goes on from its
    checkpoint."""
    first: Annotated[tuple[dict[str, ScalarField], ...], Field(strict=False)] = ()
    """Settings to try after the published one; parameters left out have their published default."""
    warm_start: str | None = None
    """Folder of an earlier run with the same objective; the sampler learns from its complete trials, too."""


class Bound(Section):
    """Bounds of a metric."""

    min: float | None = None
    """Smallest value."""
    max: float | None = None
    """Largest value."""


class Budget(Section):
    """Hours after which a search ends early; running trials are stopped at the end of their epoch."""

    gpu_hours: float | None = Field(None, gt=0)
    """GPU-hours, summed over all trials."""
    cpu_hours: float | None = Field(None, gt=0)
    """CPU-hours, summed over all trials."""


class Winner(Section):
    """Choice of the winner among the best trials, each of which is trained again from fresh seeds."""

    candidates: int = Field(2, ge=1)
    """Number of trials that are trained again: the best by the objective; with several, by Pareto front first."""
    seeds: int = Field(2, ge=1)
    """Trainings of each candidate."""
    weights: dict[str, NotNegative] = {}
    """Weight of each objective in the choice, 1 by default."""


class Promotion(Section):
    """Gates that a version must pass to become the champion."""

    metric: str | None = None
    """Metric in which the version must be better, as `grainmill evaluate` measured it, such as `copydays/strong/map`:
    benchmark, part of its protocol if it has several, measure."""
    minimum: dict[str, float] = {}
    """Smallest accepted values of such metrics."""
    megabytes: float | None = Field(None, gt=0)
    """Largest accepted size of the files that the model loads."""
    milliseconds: float | None = Field(None, gt=0)
    """Longest accepted time for one image, as the median on the machine that promotes."""


class Tracking(Section):
    """Places where runs, models and studies are recorded."""

    uri: str | None = None
    """MLflow tracking server, without the password, which goes into MLFLOW_TRACKING_PASSWORD. MLFLOW_TRACKING_URI by
    default, else SQLite in the storage folder."""
    model: Name | None = None
    """Name of the registered model; the name of the experiment by default."""
    study: str | None = None
    """Database of the search, such as postgresql://host/name, without the password, which goes into PGPASSWORD or
    ~/.pgpass. A SQLite file in the folder of the run by default."""


class Experiment(Section):
    """Settings of a search, or of one training."""

    name: Name
    """Name of the runs; it belongs to one set of settings."""
    trainable: str = "multigrain"
    """Method that is trained: the name of an installed trainable, or the dotted path of a module."""
    data: Any
    """The images."""
    base: Any
    """Settings of every trial; settings left out have their published default."""
    space: dict[str, Parameter] = {}
    """Searched parameters by dotted path, such as `loss.weight`."""
    objective: Annotated[dict[str, Literal["max", "min"]], Field(min_length=1)]
    """Metrics to make large or small; the cost of a trial, `cpu_seconds` or `gpu_seconds`, can be one of them."""
    constraints: dict[str, Bound] = {}
    """Bounds of metrics, such as `{copy_map: {min: 0.5}}`; a trial outside them wins only if no trial is inside."""
    search: Search = Search()
    budget: Budget = Budget()
    winner: Winner = Winner()
    promotion: Promotion = Promotion()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    storage: str = "grainmill-runs"
    """Folder for runs, built-in images and the local MLflow database, visible to all nodes; or `s3://bucket/prefix`,
    for all but that database."""

    _files: S3Files = PrivateAttr(default_factory=S3Files)
    _findings: catalog.Findings | None = PrivateAttr(None)

    @property
    def files(self) -> S3Files:
        """Access to data in S3, which keeps what was listed when the file was checked."""
        return self._files

    @property
    def findings(self) -> catalog.Findings | None:
        """Findings in the data when the file was checked; None if they were not looked at."""
        return self._findings

    def found(self) -> list[str]:
        """Lines on what was found in the data, warnings last."""
        if self._findings is None:
            return []
        figures = [f"{word:<10}{text}" for word, text in self._findings.figures.items()]
        return [*figures, *(f"warning: {text}" for text in self._findings.warnings)]

    @property
    def reference(self) -> dict[str, Any]:
        """Setting of the first trial: the published default of each searched parameter."""
        return completed({}, self.space, self._published)

    @property
    def first(self) -> list[dict[str, Any]]:
        """Settings of the first trials: the published one, then those of `search.first`."""
        return [completed(given, self.space, self._published) for given in ({}, *self.search.first)]

    @property
    def _published(self) -> dict[str, Any]:
        return type(self.base)().model_dump()

    def point(self, metrics: Mapping[str, float]) -> list[float]:
        """Values of the objectives, negated where smaller is better."""
        return [metrics[name] if way == "max" else -metrics[name] for name, way in self.objective.items()]

    def violations(self, metrics: Mapping[str, float]) -> list[float]:
        """Distance of each metric from its bounds: 0 if the constraint holds, inf without a finite value."""
        distances = []
        for name, bound in self.constraints.items():
            value = metrics.get(name, math.nan)
            low, high = (-math.inf if bound.min is None else bound.min), (math.inf if bound.max is None else bound.max)
            distances.append(max(low - value, value - high, 0.0) if math.isfinite(value) else math.inf)
        return distances

    def spec(self, setting: Mapping[str, Any]) -> Any:
        """Settings of one trial: the base settings, with the values of a point of the space."""
        return type(self.base).model_validate(nested(setting, self.base.model_dump()))

    PLACES: ClassVar = ("tracking", "storage", "promotion")
    """Sections that do not change what a run computes: places, and gates of promotion."""

    def identity(self) -> dict[str, Any]:
        """The settings that must be the same under one name: all but the sections `PLACES`."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=set(self.PLACES))


def experiment_model(trainable: catalog.Trainable) -> type[Experiment]:
    """`Experiment` with the types of a trainable for the sections `base` and `data`."""
    return _experiment_model(trainable.Spec, trainable.Data)


@cache
def _experiment_model(spec: type[BaseModel], data: type[BaseModel]) -> type[Experiment]:
    described = Experiment.model_fields
    sections: dict[str, Any] = {
        "base": (spec, Field(default_factory=spec, description=described["base"].description)),
        "data": (data, Field(description=described["data"].description)),
    }
    return create_model("Experiment", __base__=Experiment, __doc__=Experiment.__doc__, **sections)


def json_schema(trainable: catalog.Trainable) -> dict[str, Any]:
    """JSON schema of the experiment file, with which editors complete and check it."""
    return experiment_model(trainable).model_json_schema()


def load(
    file: Path, overrides: Overrides = (), progress: catalog.Progress = catalog.no_progress, here: bool = True
) -> Experiment:
    """Read and check an experiment file and the data that it names; starts and writes nothing.

    Args:
        file: the YAML file.
        overrides: changes to the file's content.
        progress: shows the progress of long checks.
        here: check the data and the earlier runs that the file names, too; False if only a cluster sees them.
    Raises:
        ExperimentError: with all problems found.
    """
    document = Document(file)
    if not document.tree:
        document.stop_if_wrong()
    document.apply(_part(overrides, of_trainable=True), Experiment.model_json_schema())
    try:
        trainable = catalog.find(str(document.tree.get("trainable", "multigrain")))
    except LookupError as error:
        document.add(("trainable",), str(error))
        document.stop_if_wrong()
    model = experiment_model(trainable)
    document.apply(_part(overrides, of_trainable=False), model.model_json_schema())
    if found := list(validation.address_problems(document.tree)):
        for location, message in found:
            document.add(location, message)
        document.stop_if_wrong()  # messages of later checks would show secrets
    try:
        experiment = model.model_validate(document.tree)
        parts = dict(experiment)
    except ValidationError as error:
        parts = _valid_parts(model, document, error)
    files = S3Files()
    for location, message in validation.between_sections(trainable, parts, progress, files if here else None):
        document.add(location, message)
    document.stop_if_wrong()
    if here:
        experiment._files = files
        experiment._findings = trainable.findings(experiment.data, experiment.base, progress, files)
    return experiment


def _part(overrides: Overrides, of_trainable: bool) -> Overrides:
    """The overrides of the trainable, on which the types of all others depend, or those others."""
    if isinstance(overrides, Mapping):
        return {path: value for path, value in overrides.items() if (path == "trainable") is of_trainable}
    return [text for text in overrides if text.startswith("trainable=") is of_trainable]


def _valid_parts(model: type[Experiment], document: Document, error: ValidationError) -> dict[str, Any]:
    """The sections that are valid by themselves; problems of the others are added to the document."""
    wrong: set[str | int] = set()
    for location, message in validation.error_messages(model, error):
        document.add(location, message)
        wrong.update(location[:1])
    parts = {}
    for name in model.model_fields.keys() - wrong:
        field = model.model_fields[name]
        if name in document.tree:
            adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
            parts[name] = adapter.validate_python(document.tree[name])
        else:
            parts[name] = field.get_default(call_default_factory=True)
    return parts

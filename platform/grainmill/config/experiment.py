"""Experiment file -> one frozen, checked object; or everything that is wrong with the file, with line numbers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError, create_model

from grainmill import trainable as catalog
from grainmill.config import validation
from grainmill.config.resources import Resources
from grainmill.config.section import Section
from grainmill.config.space import Parameter, ScalarField, lookup, nested
from grainmill.config.yaml_document import Document, Overrides

NotNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Search(Section):
    """How the space is searched."""

    sampler: Literal["tpe", "gp", "nsga2", "qmc", "random", "grid"] = "tpe"
    """Optuna's sampler; or `grid`: every setting of a space of `choice` and `int`, once."""
    scheduler: Literal["asha", "none"] = "asha"
    """`asha` stops the weaker trials early, judged by all objectives; the first trial always runs to its end."""
    trials: int = Field(20, ge=1)
    """Number of trials; the first has the published defaults."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the sampler."""
    grace_epochs: int | None = Field(None, ge=1)
    """Epochs before a trial can be stopped; a third of all by default."""
    reduction: int = Field(3, ge=2)
    """One trial in so many goes on at each rung of `asha`."""
    stratify: str | None = None
    """A searched parameter, such as `batch.repeats`: only trials with its same value are compared at a rung."""
    losers: Literal["stop", "pause"] = "stop"
    """What becomes of the weaker trials: with `pause`, one that comes out among the best of its rung after all goes on
    from its checkpoint."""
    first: Annotated[tuple[dict[str, ScalarField], ...], Field(strict=False)] = ()
    """Settings to try after the published one; what one leaves out has its published default."""
    warm_start: str | None = None
    """Folder of an earlier run with the same objective, from whose complete trials the sampler learns, too."""


class Bound(Section):
    """Where a metric must lie."""

    min: float | None = None
    """Smallest value."""
    max: float | None = None
    """Largest value."""


class Budget(Section):
    """When a search ends before all its trials are run; those that run then are stopped at their epoch."""

    gpu_hours: float | None = Field(None, gt=0)
    """Hours of one GPU, over all trials."""
    cpu_hours: float | None = Field(None, gt=0)
    """Hours of one CPU, over all trials."""


class Winner(Section):
    """How the winner is chosen among the best trials: each is trained again, from fresh seeds."""

    candidates: int = Field(2, ge=1)
    """Trials that are trained again: the best by the objective; with several, of the Pareto front first."""
    seeds: int = Field(2, ge=1)
    """Trainings of each."""
    weights: dict[str, NotNegative] = {}
    """Of each objective in the choice, 1 by default."""


class Promotion(Section):
    """What a version must show before it becomes the champion."""

    metric: str | None = None
    """In which it must be better, as `grainmill evaluate` measured it, such as `copydays/strong/map`: a benchmark, a
    part of its protocol if it has several, a measure."""
    minimum: dict[str, float] = {}
    """Smallest values of such metrics."""
    megabytes: float | None = Field(None, gt=0)
    """Largest size of the files that it loads."""
    milliseconds: float | None = Field(None, gt=0)
    """Longest time for one row of its input example, the median where it is promoted."""


class Tracking(Section):
    """Where runs and models are recorded."""

    uri: str | None = None
    """MLflow tracking server, without a password: that goes into MLFLOW_TRACKING_PASSWORD. MLFLOW_TRACKING_URI by
    default, else SQLite in the storage folder."""
    model: Name | None = None
    """Name of the registered model; that of the experiment by default."""
    study: str | None = None
    """Database of the search, such as postgresql://host/name, without a password: that goes into PGPASSWORD or
    ~/.pgpass. A SQLite file in the run's folder by default."""


class Experiment(Section):
    """One experiment file."""

    name: Name
    """Of the runs; belongs to one set of settings."""
    trainable: str = "multigrain"
    """What is trained: an installed trainable, or a module's dotted path."""
    data: Any
    """The images."""
    base: Any
    """Settings of every trial; what is left out has its published default."""
    space: dict[str, Parameter] = {}
    """Searched parameters by dotted path, such as `loss.weight`."""
    objective: Annotated[dict[str, Literal["max", "min"]], Field(min_length=1)]
    """Metrics to make large or small; `cpu_seconds` and `gpu_seconds`, what a trial took, can be among them."""
    constraints: dict[str, Bound] = {}
    """Bounds of metrics, such as `{copy_map: {min: 0.5}}`; a trial outside them wins only where none is inside."""
    search: Search = Search()
    budget: Budget = Budget()
    winner: Winner = Winner()
    promotion: Promotion = Promotion()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    storage: str = "grainmill-runs"
    """Folder for runs, built-in images and the local MLflow database, which all nodes must see; or `s3://bucket/prefix`,
    for all but that database."""

    @property
    def reference(self) -> dict[str, Any]:
        """The first trial's setting: the published default of each searched parameter."""
        return validation.reference(type(self.base)(), self.space)

    @property
    def first(self) -> list[dict[str, Any]]:
        """Settings of the first trials: the reference, then those that the file asks for."""
        defaults = {name: lookup(type(self.base)().model_dump(), name) for name in self.space}
        listed = [validation.completed(given, self.space, defaults) for given in self.search.first]
        return [self.reference, *listed]

    def point(self, metrics: Mapping[str, float]) -> list[float]:
        """The objectives, signed so that larger is better."""
        return [metrics[name] if way == "max" else -metrics[name] for name, way in self.objective.items()]

    def violations(self, metrics: Mapping[str, float]) -> list[float]:
        """By how much each constraint is missed; none is above 0 where all hold."""
        found = []
        for name, bound in self.constraints.items():
            value = metrics.get(name, math.nan)
            low, high = (-math.inf if bound.min is None else bound.min), (math.inf if bound.max is None else bound.max)
            found.append(max(low - value, value - high, 0.0) if math.isfinite(value) else math.inf)
        return found

    def spec(self, setting: Mapping[str, Any]) -> Any:
        """The settings of one trial: the base with a point of the space put in."""
        return type(self.base).model_validate(nested(setting, self.base.model_dump()))

    PLACES: ClassVar = ("tracking", "storage", "promotion")
    """Sections that say where things are kept, and which of them for users."""

    def identity(self) -> dict[str, Any]:
        """What must be the same under one name: all but where things are kept, and what a champion must show."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=set(self.PLACES))


def experiment_model(trainable: catalog.Trainable) -> type[Experiment]:
    """`Experiment` with the sections of one trainable filled in."""
    base = (
        trainable.Spec,
        Field(default_factory=trainable.Spec, description=Experiment.model_fields["base"].description),
    )
    data = (trainable.Data, Field(description=Experiment.model_fields["data"].description))
    return create_model("Experiment", __base__=Experiment, __doc__=Experiment.__doc__, base=base, data=data)


def json_schema(trainable: catalog.Trainable) -> dict[str, Any]:
    """JSON schema of the experiment file, for editors."""
    return experiment_model(trainable).model_json_schema()


def load(
    file: Path, overrides: Overrides = (), progress: catalog.Progress = catalog.no_progress, here: bool = True
) -> Experiment:
    """Read and check an experiment file, the data that it names included; starts and writes nothing.

    Args:
        file: the YAML file.
        overrides: changes to the file's content.
        progress: shows the progress of long checks.
        here: whether this machine sees the data and the earlier runs that the file names; else they are not checked.
    Raises:
        ExperimentError: with all problems found.
    """
    document = Document(file)
    if not document.tree:
        document.stop_if_wrong()
    document.apply(overrides)
    try:
        trainable = catalog.find(str(document.tree.get("trainable", "multigrain")))
    except LookupError as error:
        document.add(("trainable",), str(error))
        document.stop_if_wrong()
    model = experiment_model(trainable)
    parts = _validated_parts(model, document)
    for location, message in validation.between_sections(trainable, parts, progress, here):
        document.add(location, message)
    document.stop_if_wrong()
    return model.model_validate(document.tree)


def _validated_parts(model: type[Experiment], document: Document) -> dict[str, Any]:
    """The sections that are right by themselves; problems of the others go to the document."""
    wrong: set[str | int] = set()
    try:
        model.model_validate(document.tree)
    except ValidationError as error:
        for location, message in validation.error_messages(model, error):
            document.add(location, message)
            wrong.update(location[:1])
    parts = {}
    for name, field in model.model_fields.items():
        if name in wrong:
            continue
        if name in document.tree:
            adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
            parts[name] = adapter.validate_python(document.tree[name])
        else:
            parts[name] = field.get_default(call_default_factory=True)
    return parts

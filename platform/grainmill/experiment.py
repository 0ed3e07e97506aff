"""Experiment file -> one frozen, checked object; or everything that is wrong with the file, with line numbers."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from grainmill import catalog
from grainmill.document import Document, Location, dotted
from grainmill.findings import describe
from grainmill.space import Parameter, extremes, grid_problems, lookup, nested, resolve, space_problems

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Section(BaseModel):
    """A part of the experiment file: frozen, unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Search(Section):
    """How the space is searched."""

    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """Optuna's sampler; or `grid`: every setting of a space of `choice` and `int`, once."""
    scheduler: Literal["asha", "none"] = "asha"
    """`asha` stops the weaker trials early, judged by the objective; the first trial always runs to its end."""
    trials: int = Field(20, ge=1)
    """Number of trials; the first has the published defaults."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the sampler."""
    grace_epochs: int | None = Field(None, ge=1)
    """Epochs before a trial can be stopped; a third of all by default."""
    reduction: int = Field(3, ge=2)
    """One trial in so many goes on at each rung of `asha`."""


class Resources(Section):
    """What a trial gets from the cluster."""

    workers: int = Field(1, ge=1)
    """Workers of one trial; more than one train together through Ray Train."""
    retrain_workers: int = Field(1, ge=1)
    """Workers that train the winner again."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPUs of one worker."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of one worker; a fraction lets workers share one."""
    concurrent: int | None = Field(None, ge=1)
    """Trials at once; as many as the cluster holds at the start by default."""


class Tracking(Section):
    """Where runs and models are recorded."""

    uri: str | None = None
    """MLflow tracking server; MLFLOW_TRACKING_URI by default, else SQLite in the storage folder."""
    model: Name | None = None
    """Name of the registered model; that of the experiment by default."""


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
    """Metrics to make large or small, the most important first: ties by one are settled by the next."""
    search: Search = Search()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    storage: str = "grainmill-runs"
    """Folder for runs, built-in images and the local MLflow database; all nodes must see it."""

    @property
    def reference(self) -> dict[str, Any]:
        """The first trial's setting: the published default of each searched parameter."""
        return _reference(type(self.base)(), self.space)

    def spec(self, setting: Mapping[str, Any]) -> Any:
        """The settings of one trial: the base with a point of the space put in."""
        return type(self.base).model_validate(nested(setting, self.base.model_dump()))

    def identity(self) -> dict[str, Any]:
        """What must be the same under one name: all but where things are kept."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"tracking", "storage"})


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


def load(file: Path, overrides: Sequence[str] = (), track: catalog.Track = catalog.untracked) -> Experiment:
    """Read and check an experiment file, the data that it names included; starts and writes nothing.

    Args:
        file: the YAML file.
        overrides: `a.b=value`, applied to the file's content; the value is read as YAML.
        track: shows the progress of long checks.
    Raises:
        ExperimentError: with all problems found.
    """
    document = Document(file)
    if not document.tree:
        document.stop_if_wrong()
    for override in overrides:
        document.override(override)
    try:
        trainable = catalog.find(str(document.tree.get("trainable", "multigrain")))
    except LookupError as error:
        document.add(("trainable",), str(error))
        document.stop_if_wrong()
    model = experiment_model(trainable)
    parts = _validated_parts(model, document)
    for location, message in _cross_problems(trainable, parts, track):
        document.add(location, message)
    document.stop_if_wrong()
    return model.model_validate(document.tree)


def _validated_parts(model: type[Experiment], document: Document) -> dict[str, Any]:
    """The sections that are right by themselves; problems of the others go to the document."""
    wrong: set[str | int] = set()
    try:
        model.model_validate(document.tree)
    except ValidationError as error:
        for details in error.errors():
            document.add(details["loc"], describe(model, details))
            wrong.update(details["loc"][:1])
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


def _cross_problems(
    trainable: catalog.Trainable, parts: Mapping[str, Any], track: catalog.Track
) -> Iterator[tuple[Location, str]]:
    """What is wrong between sections, as far as the sections themselves are right."""
    if "data" in parts:
        messages = trainable.data_problems(parts["data"], track)
        yield from ((("data",), message) for message in messages)
        if "objective" in parts and not messages:
            yield from _objective_problems(trainable.metrics(parts["data"]), parts["objective"])
    if {"objective", "search"} <= parts.keys() and parts["search"].scheduler == "asha" and len(parts["objective"]) > 1:
        message = f"asha judges by one objective, got {len(parts['objective'])}; set search.scheduler to none"
        yield ("search", "scheduler"), message
    if {"search", "base"} <= parts.keys() and (parts["search"].grace_epochs or 1) > parts["base"].epochs:
        message = f"must be at most base.epochs, got {parts['search'].grace_epochs} of {parts['base'].epochs}"
        yield ("search", "grace_epochs"), message
    if "space" in parts:
        problems = list(_path_problems(trainable.Spec().model_dump(), parts["space"]))
        for name, messages in space_problems(parts["space"]).items():
            problems += [(("space", name), message) for message in messages]
        yield from problems
        if "search" in parts and parts["search"].sampler == "grid" and not problems:
            reference = _reference(trainable.Spec(), parts["space"])
            yield from grid_problems(parts["space"], reference, parts["search"].trials)
        if "base" in parts and not problems:
            yield from _setting_problems(trainable, parts)


def _objective_problems(metrics: Mapping[str, str], objective: Mapping[str, str]) -> Iterator[tuple[Location, str]]:
    for name, direction in objective.items():
        if name not in metrics:
            near = difflib.get_close_matches(name, metrics, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield ("objective", name), f"must be a metric that these data allow; {hint}known: {', '.join(metrics)}"
        elif direction != metrics[name]:
            yield (
                ("objective", name),
                f"{name} is better the {'larger' if metrics[name] == 'max' else 'smaller'}; set {metrics[name]}",
            )


def _path_problems(defaults: Mapping[str, Any], space: Mapping[str, Parameter]) -> Iterator[tuple[Location, str]]:
    """Searched parameters that are no setting of the trainable."""
    known = list(_leaves(defaults))
    for name in space:
        if name in known and lookup(defaults, name) is None:
            yield ("space", name), "must have a published value for the first trial, but has none; set it in base"
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            yield ("space", name), f"must be a setting of the trainable; {hint}"
    if "epochs" in space:
        yield (
            ("space", "epochs"),
            "trials are compared at equal epochs, so `epochs` cannot be searched; set base.epochs",
        )


def _setting_problems(trainable: catalog.Trainable, parts: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """What is wrong with settings at the ends of the space; each message once."""
    space, base = parts["space"], parts["base"].model_dump()
    defaults = trainable.Spec().model_dump()
    workers: dict[int, str] = {}
    if "resources" in parts:
        workers = {parts["resources"].retrain_workers: "retrain_workers", parts["resources"].workers: "workers"}
    seen: set[tuple[Location, str]] = set()
    reference = _reference(trainable.Spec(), space)
    for setting in extremes(space, {name: lookup(defaults, name) for name in space}):
        found: list[tuple[Location, str]] = []
        moved = [name for name, value in setting.items() if value != reference[name]]
        try:
            spec = trainable.Spec.model_validate(nested(setting, base))
            for count, key in workers.items():
                found += [(("resources", key), message) for message in trainable.worker_problems(spec, count)]
        except ValidationError as error:
            for details in error.errors():
                culprits = [name for name in [dotted(details["loc"]), *moved] if name in space]
                found.append((("space", culprits[0]) if culprits else ("base",), describe(trainable.Spec, details)))
        for place, message in found:
            rule = message.partition(", got")[0]
            if (place, rule) not in seen:
                seen.add((place, rule))
                at = " (at " + ", ".join(f"{name} = {setting[name]}" for name in moved) + ")" if moved else ""
                yield place, message + at


def _reference(published: BaseModel, space: Mapping[str, Parameter]) -> dict[str, Any]:
    defaults = published.model_dump()
    return resolve(space, lambda name, _: lookup(defaults, name))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key

"""What is wrong between the sections of an experiment file, and with the points of its space."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from grainmill import trainable as catalog
from grainmill.config.space import (
    Parameter,
    Setting,
    Space,
    extremes,
    grid_problems,
    lookup,
    nested,
    resolve,
    space_problems,
)
from grainmill.config.yaml_document import Document, Location, Overrides, dotted
from grainmill.storage import workspace
from grainmill.storage.mirror import S3Files

COSTS: Mapping[str, catalog.Direction] = {"cpu_seconds": "min", "gpu_seconds": "min"}
"""Metrics of every trial, whatever is trained: seconds times what was reserved, up to the epoch."""
HOURS: Mapping[str, str] = {"cpu_seconds": "CPU-hours", "gpu_seconds": "accelerator-hours"}
"""Names of the costs, in hours."""

Model = TypeVar("Model", bound=BaseModel)

_RULES = {
    "dict_type": "must hold keys and values",
    "model_type": "must hold keys and values",
    "string_pattern_mismatch": "must be 1 to 64 letters, digits, `.`, `_` or `-`, the first a letter or a digit",
    "too_long": "must have at most {max_length} items",
    "too_short": "must have at least {min_length} items",
    "tuple_type": "must be a list in [brackets]",
}
"""Rules by pydantic's type of error, where its own message is unclear to users."""


def error_messages(model: type[BaseModel], error: ValidationError) -> Iterator[tuple[Location, str]]:
    """Location and message (rule, value found, remedy) of each error that pydantic found in the input of `model`."""
    for details in error.errors():
        # pydantic does not count wrong items of a tuple, and calls it too short for that reason alone.
        if details["type"] != "too_short" or len(details["input"]) < details["ctx"]["min_length"]:
            yield details["loc"], _message(model, details)


def checked_settings(model: type[Model], overrides: Overrides, tree: Mapping[str, Any] | None = None) -> Model:
    """Settings of one command.

    Args:
        model: the settings and their defaults.
        overrides: changes to them.
        tree: plain data that the overrides change; empty by default.
    Raises:
        ExperimentError: with all problems found.
    """
    document = Document(None)
    document.tree = dict(tree or {})
    document.apply(overrides)
    document.stop_if_wrong()
    try:
        return model.model_validate(document.tree)
    except ValidationError as error:
        for location, message in error_messages(model, error):
            document.add(location, message)
    document.stop_if_wrong()
    raise AssertionError("a validation error is a problem")


def _message(model: type[BaseModel], details: ErrorDetails) -> str:
    *parents, key = details["loc"] or ("",)
    fields = _fields_at(model, parents)
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(key), fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(fields)}"
        return f"unknown key; {hint}"
    if details["type"] == "missing":
        return "both bounds are required, [low, high]" if isinstance(key, int) else "this key is required"
    if details["type"] == "value_error":
        return details["msg"].removeprefix("Value error, ")
    rule = _RULES.get(details["type"], "").format(**details.get("ctx", {}))
    rule = rule or details["msg"].replace("Input should be", "must be", 1)
    remedy = ""
    if details["type"] == "literal_error" and (
        near := difflib.get_close_matches(str(details["input"]), rule.split("'"), n=1)
    ):
        remedy = f"; did you mean {near[0]!r}?"
    elif (field := fields.get(str(key))) is not None and not field.is_required():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, bool | int | float | str):
            remedy = f"; leave it out for the default, {default!r}"
        elif details["input"] is None:
            remedy = "; leave the key out, too"
    return f"{rule}, got {details['input']!r}{remedy}"


def _fields_at(model: type[BaseModel], parents: Sequence[str | int]) -> dict[str, Any]:
    """The fields of the model at a location inside `model`; empty if no model is there."""
    annotation: Any = model
    for parent in parents:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(parent))
            annotation = field.annotation if field else None
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
    fields = annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else {}
    return {field.alias or name: field for name, field in fields.items()}


def between_sections(
    trainable: catalog.Trainable, parts: Mapping[str, Any], progress: catalog.Progress, here: bool
) -> Iterator[tuple[Location, str]]:
    """What is wrong between sections, as far as the sections themselves are right.

    What only the machine can tell that sees the files named there is left out unless it is `here`.
    """
    if here and "data" in parts:
        files = S3Files()
        messages = trainable.data_problems(parts["data"], progress, files)
        yield from ((("data",), message) for message in messages)
        if not messages:
            yield from _metric_problems({**trainable.metrics(parts["data"], files), **COSTS}, parts)
    yield from _place_problems(parts)
    if {"search", "base"} <= parts.keys() and (parts["search"].grace_epochs or 1) > parts["base"].epochs:
        message = f"must be at most base.epochs, got {parts['search'].grace_epochs} of {parts['base'].epochs}"
        yield ("search", "grace_epochs"), message
    if "space" not in parts:
        return
    space = parts["space"]
    problems = list(_path_problems(trainable.Spec().model_dump(), space))
    for name, found in space_problems(space).items():
        problems += [(("space", name), message) for message in found]
    yield from problems
    if problems:
        return
    published = reference(trainable.Spec(), space)
    if "search" in parts:
        yield from _search_problems(parts["search"], space)
        if parts["search"].sampler == "grid":
            yield from grid_problems(space, published, parts["search"].trials)
        if here and "tracking" in parts and parts["search"].warm_start is not None and parts["tracking"].study is None:
            yield from _warm_start_problems(parts["search"].warm_start)
    if "base" in parts:
        yield from _setting_problems(trainable, parts)


def _place_problems(parts: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """What is wrong with the places where things are kept."""
    if "storage" in parts and (message := workspace.problem(parts["storage"])):
        yield ("storage",), message
    if "tracking" in parts and parts["tracking"].study is not None:
        yield from _address_problems(parts["tracking"].study)
    if "tracking" in parts and "@" in (parts["tracking"].uri or ""):
        message = "must not hold a user or a password, but does; put them into MLFLOW_TRACKING_USERNAME and _PASSWORD"
        yield ("tracking", "uri"), message


def _metric_problems(metrics: Mapping[str, str], parts: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    objective = parts.get("objective", {})
    for section, names in (("objective", objective), ("constraints", parts.get("constraints", {}))):
        for name in names:
            if name not in metrics:
                near = difflib.get_close_matches(name, metrics, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                yield (section, name), f"must be a metric that these data allow; {hint}known: {', '.join(metrics)}"
    for name, direction in objective.items():
        if direction != metrics.get(name, direction):
            way = "larger" if metrics[name] == "max" else "smaller"
            yield ("objective", name), f"{name} is better the {way}; set {metrics[name]}"
    for name, bound in parts.get("constraints", {}).items():
        if bound.min is None and bound.max is None:
            yield ("constraints", name), "a constraint needs `min`, `max` or both, got neither; set one"
        elif bound.min is not None and bound.max is not None and bound.min > bound.max:
            message = f"min must be at most max, got {bound.min:g} and {bound.max:g}; swap or spread them"
            yield ("constraints", name), message
    if objective and "winner" in parts:
        weights = parts["winner"].weights
        for name in weights.keys() - objective.keys():
            yield ("winner", "weights", name), f"must be an objective; known: {', '.join(objective)}"
        if not any(weights.get(name, 1) for name in objective):
            yield ("winner", "weights"), "one objective must weigh more than 0, got none; raise one"


def _address_problems(url: str) -> Iterator[tuple[Location, str]]:
    place = ("tracking", "study")
    try:
        parsed = urlsplit(url)
        if parsed.password is not None:
            yield place, "must not hold a password, but does; put it into PGPASSWORD or ~/.pgpass"
        elif parsed.scheme.partition("+")[0] not in ("postgresql", "sqlite"):
            yield place, f"must begin with postgresql:// or sqlite://, got {parsed.scheme or 'neither'}; change it"
    except ValueError as error:
        yield place, f"must be an address such as postgresql://host/name, but {error}; correct it"


def _search_problems(search: Any, space: Space) -> Iterator[tuple[Location, str]]:
    if search.stratify is not None and (search.stratify not in space or space[search.stratify].values is None):
        choices = [name for name, parameter in space.items() if parameter.values is not None]
        known = f"known: {', '.join(choices)}" if choices else "there is none here; leave it out"
        message = f"must be a searched parameter of `choice` or `int`, got {search.stratify}; {known}"
        yield ("search", "stratify"), message
    if search.losers == "pause" and search.scheduler != "asha":
        yield ("search", "losers"), "only asha has losers; set search.scheduler to asha, or leave this out"
    for index, setting in enumerate(search.first):
        for name in setting.keys() - space.keys():
            near = difflib.get_close_matches(name, space, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(space) or 'none'}"
            yield ("search", "first", index, name), f"must be a searched parameter; {hint}"
    if search.first and search.sampler == "grid":
        yield ("search", "first"), "a grid has every setting anyway; leave it out"
    if search.trials <= len(search.first):
        message = f"must be more than the {len(search.first)} first settings, got {search.trials}; raise it"
        yield ("search", "trials"), message


def _warm_start_problems(place: str) -> Iterator[tuple[Location, str]]:
    if not workspace.is_remote(place) and not Path(place, "study.db").is_file():
        message = f"must be the folder of an earlier search, but there is no {Path(place, 'study.db').absolute()}"
        yield ("search", "warm_start"), f"{message}; name one such as grainmill-runs/demo/run-1"


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
        message = "trials are compared at equal epochs, so `epochs` cannot be searched; set base.epochs"
        yield ("space", "epochs"), message


def _setting_problems(trainable: catalog.Trainable, parts: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """What is wrong with settings at the ends of the space; each message once."""
    space, base = parts["space"], parts["base"].model_dump()
    defaults = trainable.Spec().model_dump()
    workers: dict[Sequence[int], str] = {}
    if "resources" in parts:
        for key in ("retrain_workers", "workers"):
            workers[counts(getattr(parts["resources"], key))] = key
    seen: set[tuple[Location, str]] = set()
    published = reference(trainable.Spec(), space)
    for setting in _points(parts, space, {name: lookup(defaults, name) for name in space}):
        found: list[tuple[Location, str]] = []
        moved = [name for name, value in setting.items() if value != published[name]]
        try:
            spec = trainable.Spec.model_validate(nested(setting, base))
            for some, key in workers.items():
                found += [(("resources", key), message) for message in _worker_problems(trainable, spec, some)]
        except ValidationError as error:
            for location, message in error_messages(trainable.Spec, error):
                culprits = [name for name in [dotted(location), *moved] if name in space]
                found.append((("space", culprits[0]) if culprits else ("base",), message))
        for place, message in found:
            rule = message.partition(", got")[0]
            if (place, rule) not in seen:
                seen.add((place, rule))
                at = " (at " + ", ".join(f"{name} = {setting[name]}" for name in moved) + ")" if moved else ""
                yield place, message + at


def counts(workers: int | tuple[int, int]) -> Sequence[int]:
    """All numbers of workers that a trial may have."""
    return range(workers, workers + 1) if isinstance(workers, int) else range(workers[0], workers[1] + 1)


def _worker_problems(trainable: catalog.Trainable, spec: Any, counts: Sequence[int]) -> list[str]:
    """What keeps a spec from running on any of these numbers of workers."""
    found = [message for count in counts for message in trainable.worker_problems(spec, count)]
    if not found or len(counts) == 1:
        return found
    # What suits one number of workers may not suit the next; what suits their common multiple suits all.
    found = trainable.worker_problems(spec, math.lcm(*counts)) or found
    return [f"{message} (for any of {counts[0]} to {counts[-1]} workers)" for message in found]


def _points(parts: Mapping[str, Any], space: Space, defaults: Setting) -> Iterator[Setting]:
    """The settings to check: the ends of the space, and those that the file asks for."""
    yield from extremes(space, defaults)
    for given in parts["search"].first if "search" in parts else ():
        if given.keys() <= space.keys():
            yield completed(given, space, defaults)


def completed(given: Setting, space: Space, defaults: Setting) -> dict[str, Any]:
    """A setting of which a part is given: the rest has its default, or is fixed by a condition."""
    return resolve(space, lambda name, _: {**defaults, **given}[name])


def reference(published: BaseModel, space: Space) -> dict[str, Any]:
    """The published default of each searched parameter."""
    defaults = published.model_dump()
    return resolve(space, lambda name, _: lookup(defaults, name))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key

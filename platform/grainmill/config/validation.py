"""Checks of settings: messages for pydantic's errors, and rules between the sections of an experiment file."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from grainmill import trainable as catalog
from grainmill.config import addresses
from grainmill.config.space import Parameter, Space, completed, extremes, grid_problems, lookup, nested, space_problems
from grainmill.config.yaml_document import Document, Location, Overrides, dotted
from grainmill.storage import workspace

COSTS: Mapping[str, catalog.Direction] = {"cpu_seconds": "min", "gpu_seconds": "min"}
"""Cost metrics of every trial: seconds times the reserved CPUs or GPUs, up to the epoch."""
HOURS: Mapping[str, str] = {"cpu_seconds": "CPU-hours", "gpu_seconds": "accelerator-hours"}
"""Units of the costs in hours."""

Model = TypeVar("Model", bound=BaseModel)
Problems = Iterator[tuple[Location, str]]
"""Locations in the experiment file, and messages."""

_RULES = {
    "dict_type": "must hold keys and values",
    "model_type": "must hold keys and values",
    "string_type": "must be text",
    "string_pattern_mismatch": "must be 1 to 64 letters, digits, `.`, `_` or `-`, the first a letter or a digit",
    "too_long": "must have at most {max_length} items",
    "too_short": "must have at least {min_length} items",
    "tuple_type": "must be a list in [brackets]",
}
"""Rules by pydantic's type of error, where its own message is unclear to users."""


def error_messages(model: type[BaseModel], error: ValidationError) -> Problems:
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
    document.apply(overrides, model.model_json_schema())
    for location, message in address_problems(document.tree):
        document.add(location, message)
    document.stop_if_wrong()
    try:
        return model.model_validate(document.tree)
    except ValidationError as error:
        for location, message in error_messages(model, error):
            document.add(location, message)
    document.stop_if_wrong()
    raise AssertionError("a validation error is a problem")


def address_problems(tree: Any, location: Location = ()) -> Problems:
    """Addresses with secrets or of unknown kinds, anywhere in plain data; those of `tracking` may be of any kind."""
    if isinstance(tree, str):
        message = addresses.problem(tree) or (None if location[:1] == ("tracking",) else addresses.misspelt(tree))
        if message:
            yield location, message
    branches: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        branches = tree.items()
    elif isinstance(tree, list | tuple):
        branches = enumerate(tree)
    for key, branch in branches:
        yield from address_problems(branch, (*location, key))


def _hint(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A question for the known name that is nearest to a wrong one; `otherwise` if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def _hint_of_all(name: str, known: Iterable[str]) -> str:
    """The nearest known name, if any is near, and all known names."""
    names = list(known)
    return f"{_hint(name, names)} known: {', '.join(names)}".strip()


def _message(model: type[BaseModel], details: ErrorDetails) -> str:
    *parents, key = details["loc"] or ("",)
    fields = _fields_at(model, parents)
    if details["type"] == "extra_forbidden":
        return f"unknown key; {_hint(str(key), fields, 'known here: ' + ', '.join(fields))}"
    if details["type"] == "missing":
        return "both bounds are required, [low, high]" if isinstance(key, int) else "this key is required"
    if details["type"] == "value_error":
        return details["msg"].removeprefix("Value error, ")
    rule = _RULES.get(details["type"], "").format(**details.get("ctx", {}))
    rule = rule or details["msg"].replace("Input should be", "must be", 1)
    remedy = _hint(str(details["input"]), rule.split("'")) if details["type"] == "literal_error" else ""
    if details["type"] == "string_type" and isinstance(details["input"], bool | int | float):
        remedy = "put it in quotes"
    if not remedy and (field := fields.get(str(key))) is not None and not field.is_required():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, bool | int | float | str):
            remedy = f"leave it out for the default, {default!r}"
        elif details["input"] is None:
            remedy = "leave the key out, too"
    return f"{rule}, got {details['input']!r}" + (f"; {remedy}" if remedy else "")


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
    trainable: catalog.Trainable, parts: Mapping[str, Any], progress: catalog.Progress, files: catalog.Files | None
) -> Problems:
    """Problems between sections.

    Args:
        trainable: the method of the experiment.
        parts: the sections that are valid by themselves.
        progress: shows the progress of long checks.
        files: access to data in S3; None if the files that the sections name are not to be checked.
    """
    if files and "data" in parts:
        messages = trainable.data_problems(parts["data"], progress, files)
        yield from ((("data",), message) for message in messages)
        if not messages:
            yield from _metric_problems({**trainable.metrics(parts["data"], files), **COSTS}, parts)
    yield from _place_problems(parts)
    if "promotion" in parts:
        yield from _promotion_problems(trainable.query_measures(), parts["promotion"])
    if {"search", "base"} <= parts.keys() and (parts["search"].grace_epochs or 1) > parts["base"].epochs:
        message = f"must be at most base.epochs, got {parts['search'].grace_epochs} of {parts['base'].epochs}"
        yield ("search", "grace_epochs"), message
    if "space" not in parts:
        return
    space, published = parts["space"], trainable.Spec().model_dump()
    problems = list(_path_problems(published, space))
    problems += [(("space", name), message) for name, found in space_problems(space).items() for message in found]
    yield from problems
    if problems:
        return
    if "search" in parts:
        search = parts["search"]
        yield from _search_problems(search, space)
        if search.sampler == "grid":
            yield from grid_problems(space, completed({}, space, published), search.trials)
        if files and "tracking" in parts and search.warm_start is not None and parts["tracking"].study is None:
            yield from _warm_start_problems(search.warm_start)
    if "base" in parts:
        yield from _setting_problems(trainable, parts, published, files is not None)


def _place_problems(parts: Mapping[str, Any]) -> Problems:
    """Problems of the storage folder, the MLflow server and the database of the study."""
    if "storage" in parts and (message := workspace.problem(parts["storage"])):
        yield ("storage",), message
    if "tracking" in parts and parts["tracking"].study is not None:
        yield from _address_problems(parts["tracking"].study)


def _promotion_problems(measures: Mapping[str, Sequence[str]], promotion: Any) -> Problems:
    """Problems of the metrics by which versions are compared, query by query."""
    places: list[tuple[Location, str]] = [(("promotion", "minimum", name), name) for name in promotion.minimum]
    if promotion.metric is not None:
        places.append((("promotion", "metric"), promotion.metric))
    for place, name in places if measures else ():
        benchmark, _, rest = name.partition("/")
        if benchmark not in measures:
            yield place, f"must begin with a benchmark, got {name!r}; {_hint_of_all(benchmark, measures)}"
        elif (measure := rest.rpartition("/")[2]) not in measures[benchmark]:
            rule = f"must end with a measure of {benchmark} that has a value for each query, got {name!r}"
            yield place, f"{rule}; {_hint_of_all(measure, measures[benchmark])}"


def _metric_problems(metrics: Mapping[str, str], parts: Mapping[str, Any]) -> Problems:
    objective, constraints = parts.get("objective", {}), parts.get("constraints", {})
    for section, names in (("objective", objective), ("constraints", constraints)):
        for name in (name for name in names if name not in metrics):
            yield (section, name), f"must be a metric that these data allow; {_hint_of_all(name, metrics)}"
    for name, direction in objective.items():
        if direction != metrics.get(name, direction):
            way = "larger" if metrics[name] == "max" else "smaller"
            yield ("objective", name), f"{name} is better the {way}; set {metrics[name]}"
    for name, bound in constraints.items():
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


def _address_problems(url: str) -> Problems:
    place = ("tracking", "study")
    try:
        parsed = urlsplit(url)
        if parsed.scheme.partition("+")[0] not in ("postgresql", "sqlite"):
            yield place, f"must begin with postgresql:// or sqlite://, got {parsed.scheme or 'neither'}; change it"
    except ValueError as error:
        yield place, f"must be an address such as postgresql://host/name, but {error}; correct it"


def _search_problems(search: Any, space: Space) -> Problems:
    if search.stratify is not None and (search.stratify not in space or space[search.stratify].values is None):
        choices = [name for name, parameter in space.items() if parameter.values is not None]
        known = f"known: {', '.join(choices)}" if choices else "there is none here; leave it out"
        message = f"must be a searched parameter of `choice` or `int`, got {search.stratify}; {known}"
        yield ("search", "stratify"), message
    if search.losers == "pause" and search.scheduler != "asha":
        yield ("search", "losers"), "only asha has losers; set search.scheduler to asha, or leave this out"
    for index, setting in enumerate(search.first):
        for name in setting.keys() - space.keys():
            hint = _hint(name, space, f"known: {', '.join(space) or 'none'}")
            yield ("search", "first", index, name), f"must be a searched parameter; {hint}"
    if search.first and search.sampler == "grid":
        yield ("search", "first"), "a grid has every setting anyway; leave it out"
    if search.trials <= len(search.first):
        message = f"must be more than the {len(search.first)} first settings, got {search.trials}; raise it"
        yield ("search", "trials"), message


def _warm_start_problems(place: str) -> Problems:
    study = Path(workspace.absolute(place), "study.db")
    if not workspace.is_remote(place) and not study.is_file():
        message = f"must be the folder of an earlier search, but there is no {study}"
        yield ("search", "warm_start"), f"{message}; name one such as grainmill-runs/demo/run-1"


def _path_problems(published: Mapping[str, Any], space: Mapping[str, Parameter]) -> Problems:
    """Searched parameters that are no settings of the trainable, or have no published value."""
    known = list(_leaves(published))
    for name in space:
        if name in known and lookup(published, name) is None:
            yield ("space", name), "must have a published value for the first trial, but has none; set it in base"
        elif name not in known:
            hint = _hint(name, known, f"known: {', '.join(known)}")
            yield ("space", name), f"must be a setting of the trainable; {hint}"
    if "epochs" in space:
        message = "trials are compared at equal epochs, so `epochs` cannot be searched; set base.epochs"
        yield ("space", "epochs"), message


def _setting_problems(
    trainable: catalog.Trainable, parts: Mapping[str, Any], published: Mapping[str, Any], here: bool
) -> Problems:
    """Problems of the settings at the ends of the space and of `search.first`; each rule once for each key.

    What a trainable finds at a setting, such as in a file that it names, counts if the trials are to run `here`.
    """
    space, base = parts["space"], parts["base"].model_dump()
    keys = ("retrain_workers", "workers") if "resources" in parts else ()
    workers = {_counts(getattr(parts["resources"], key)): key for key in keys}
    defaults = completed({}, space, published)
    first = parts["search"].first if "search" in parts else ()
    listed = (completed(given, space, published) for given in first if given.keys() <= space.keys())
    seen: set[tuple[Location, str]] = set()
    for setting in (*extremes(space, {name: lookup(published, name) for name in space}), *listed):
        found: list[tuple[Location, str]] = []
        moved = [name for name, value in setting.items() if value != defaults[name]]
        try:
            spec = trainable.Spec.model_validate(nested(setting, base))
            for counts, key in workers.items():
                of_trainable = _worker_problems(trainable, spec, counts)
                for name, message in (problem for problem in of_trainable if here or not problem[0]):
                    place: Location = ("base", *name.split(".")) if name else ("resources", key)
                    found.append((("space", name) if name in space else place, message))
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


def _counts(workers: int | tuple[int, int]) -> Sequence[int]:
    """All numbers of workers that a trial may have."""
    return range(workers, workers + 1) if isinstance(workers, int) else range(workers[0], workers[1] + 1)


def _worker_problems(trainable: catalog.Trainable, spec: Any, counts: Sequence[int]) -> list[tuple[str, str]]:
    """Reasons why a spec cannot run on one of these numbers of workers, each with the setting that causes it."""
    found = dict.fromkeys(problem for count in counts for problem in trainable.worker_problems(spec, count))
    of_count = [problem for problem in found if not problem[0]]
    if not of_count or len(counts) == 1:
        return [*found]
    # A remedy for one number of workers may not suit the next; one for their common multiple suits all.
    joint = [problem for problem in trainable.worker_problems(spec, math.lcm(*counts)) if not problem[0]] or of_count
    numbers = f" (for any of {counts[0]} to {counts[-1]} workers)"
    return [problem for problem in found if problem[0]] + [("", message + numbers) for _, message in joint]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key

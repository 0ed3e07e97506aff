"""Search space: the searched parameters, their ranges and conditions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, islice, product
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator


def _scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"must be a finite number, a string, true or false, got {value!r}")
    return value


Scalar = bool | int | float | str
# Checked by a function: pydantic would report a failed union once for each of its types.
ScalarField = Annotated[Any, AfterValidator(_scalar), WithJsonSchema({"type": ["boolean", "number", "string"]})]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Values = Annotated[tuple[ScalarField, ...], Field(min_length=1, strict=False)]
Setting = Mapping[str, Scalar]
"""A value for each parameter, by dotted path."""

SHORT = 16
"""Largest number of whole numbers in a range that are all tried when the space is checked."""
KINDS = ("uniform", "loguniform", "int", "choice")
LARGEST_GRID = 10_000
"""Number of settings of the largest grid."""


class Parameter(BaseModel):
    """A searched parameter, with exactly one of `uniform`, `loguniform`, `int` and `choice`.

    With `when`, the parameter is searched only if other parameters have certain values, and has the value `otherwise`
    if they do not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    uniform: Annotated[tuple[Finite, Finite], Field(strict=False)] | None = None
    """[low, high], both included."""
    loguniform: Annotated[tuple[Finite, Finite], Field(strict=False)] | None = None
    """[low, high], both included, uniform in the logarithm; low is above 0."""
    integer: Annotated[tuple[int, int], Field(strict=False)] | None = Field(None, alias="int")
    """[low, high], whole numbers, both included."""
    choice: Values | None = None
    """The values to choose from."""
    when: dict[str, Values] | None = None
    """Other parameters and the values at which this one is searched."""
    otherwise: ScalarField | None = None
    """Value if the parameter is not searched."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [kind for kind, value in zip(KINDS, self._kinds(), strict=True) if value is not None]
        if len(given) != 1:
            raise ValueError(f"a parameter needs exactly one of {', '.join(KINDS)}, got {', '.join(given) or 'none'}")
        for bounds in (self.uniform, self.loguniform, self.integer):
            if bounds and not bounds[0] < bounds[1]:
                raise ValueError(f"low < high must hold, got {list(bounds)}; swap or spread the bounds")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform needs low > 0, got {self.loguniform[0]}; raise it, or use uniform")
        if self.choice and len(set(self.choice)) < len(self.choice):
            raise ValueError(f"choices must differ, got {list(self.choice)}; remove the repeated ones")
        if (self.when is None) != (self.otherwise is None):
            raise ValueError("`when` and `otherwise` belong together; give both or neither")
        return self

    def _kinds(self) -> tuple[Any, ...]:
        return self.uniform, self.loguniform, self.integer, self.choice

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """The two bounds; for a choice or a short range of whole numbers, all values."""
        if self.integer and self.integer[1] - self.integer[0] < SHORT:
            return tuple(range(self.integer[0], self.integer[1] + 1))
        return next(value for value in self._kinds() if value is not None)

    @property
    def values(self) -> Sequence[Scalar] | None:
        """All values; None for a range of real numbers."""
        return range(self.integer[0], self.integer[1] + 1) if self.integer else self.choice

    def contains(self, value: Scalar) -> bool:
        """Return True when a search could draw `value`."""
        if self.choice:
            return value in self.choice
        if isinstance(value, str | bool) or (self.integer and value != int(value)):
            return False
        low, high = self.ends[0], self.ends[-1]
        return low <= value <= high  # type: ignore[operator]  # ends of a range are numbers

    def active(self, drawn: Setting) -> bool:
        """Return True when the parameter is searched, given the values of the parameters that it depends on."""
        return all(drawn[name] in values for name, values in (self.when or {}).items())


Space = Mapping[str, Parameter]


def space_problems(space: Space) -> dict[str, list[str]]:
    """Problems of the conditions `when`, by parameter."""
    problems: dict[str, list[str]] = {}
    for name, parameter in space.items():
        for other, values in (parameter.when or {}).items():
            if other not in space:
                message = f"`when` must name searched parameters, got {other}; known: {', '.join(space)}"
                problems.setdefault(name, []).append(message)
            elif strangers := [value for value in values if not space[other].contains(value)]:
                problems.setdefault(name, []).append(f"`when` must name values that {other} can have, got {strangers}")
    if not problems and len(list(_dependency_order(space))) < len(space):
        ring = set(space) - set(_dependency_order(space))
        while outside := ring - {other for name in ring for other in space[name].when or ()}:
            ring -= outside
        message = "conditions must not form a ring; drop a `when` of " + ", ".join(sorted(ring))
        problems |= {name: [message] for name in ring}
    return problems


def _dependency_order(space: Space) -> Iterator[str]:
    """Names of the parameters, each after those that it depends on, without those in a ring of conditions."""
    placed: set[str] = set()
    while ready := [name for name in space if name not in placed and placed.issuperset(space[name].when or ())]:
        placed.update(ready)
        yield from ready


def resolve(space: Space, draw: Callable[[str, Parameter], Scalar]) -> dict[str, Scalar]:
    """Make one setting: call `draw` for each parameter that is active, given the values drawn before."""
    drawn: dict[str, Scalar] = {}
    for name in _dependency_order(space):
        parameter = space[name]
        value = draw(name, parameter) if parameter.active(drawn) else parameter.otherwise
        assert value is not None, "a condition has an `otherwise`"
        drawn[name] = value
    return drawn


def completed(given: Setting, space: Space, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a setting: other parameters have their value in the tree `defaults`, or that of a condition."""
    return resolve(space, lambda name, _: given[name] if name in given else lookup(defaults, name))


def grid(space: Space) -> Iterator[dict[str, Scalar]]:
    """Every setting of a space without ranges of real numbers, each once."""
    names = list(_dependency_order(space))

    def extend(drawn: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if len(drawn) == len(names):
            yield drawn
            return
        name = names[len(drawn)]
        parameter = space[name]
        for value in (parameter.values or ()) if parameter.active(drawn) else (parameter.otherwise,):
            yield from extend({**drawn, name: value})

    yield from extend({})


def grid_problems(space: Space, reference: Setting, trials: int) -> Iterator[tuple[tuple[str, str], str]]:
    """Reasons why `trials` trials, the reference first, are not the whole grid: keys of the file, and messages."""
    endless = [name for name, parameter in space.items() if parameter.values is None]
    for name in endless:
        message = f"a grid needs `choice` or `int`, got the range {list(space[name].ends)}; list the values to try"
        yield ("space", name), message
    if endless:
        return
    settings = list(islice(grid(space), LARGEST_GRID + 1))
    count = len(settings) + (reference not in settings)
    if len(settings) > LARGEST_GRID:
        yield ("search", "sampler"), f"a grid has at most {LARGEST_GRID} settings, got more; use tpe, or fewer values"
    elif trials != count:
        message = f"must be the number of the grid's settings, the published one included, got {trials} for {count}"
        yield ("search", "trials"), f"{message}; set it to {count}"


def extremes(space: Space, reference: Setting) -> Iterator[dict[str, Scalar]]:
    """The reference, and each setting with one or two of its parameters at an end of their range."""
    yield resolve(space, lambda name, _: reference[name])
    for moved in [*((name,) for name in space), *combinations(space, 2)]:
        for values in product(*(space[name].ends for name in moved)):
            setting = {**reference, **dict(zip(moved, values, strict=True))}
            yield resolve(space, lambda name, _, setting=setting: setting[name])  # type: ignore[misc]


def nested(setting: Setting, base: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of the tree `base` with the values of `setting` at their dotted paths."""
    tree = dict(base)
    for path, value in setting.items():
        head, _, rest = path.partition(".")
        branch = tree.get(head)
        tree[head] = nested({rest: value}, branch if isinstance(branch, Mapping) else {}) if rest else value
    return tree


def lookup(tree: Any, path: str) -> Any:
    """Value at a dotted path of nested mappings. Raises KeyError if there is none."""
    for key in path.split("."):
        if not isinstance(tree, Mapping):
            raise KeyError(path)
        tree = tree[key]
    return tree


def shown(value: Any) -> str:
    """A value as text, with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)

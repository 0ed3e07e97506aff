"""What pydantic finds wrong, in our words."""

import difflib
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_RULES = {
    "dict_type": "must hold keys and values",
    "model_type": "must hold keys and values",
    "string_pattern_mismatch": "must be 1 to 64 letters, digits, `.`, `_` or `-`, the first a letter or a digit",
    "too_long": "must have at most {max_length} items",
    "too_short": "must have at least {min_length} items",
    "tuple_type": "must be a list in [brackets]",
}
"""By pydantic's type of error, where its own message is not for people."""


def errors(error: ValidationError) -> list[ErrorDetails]:
    """What pydantic finds, without tuples that are too short only because it does not count their wrong items."""
    return [
        details
        for details in error.errors()
        if details["type"] != "too_short" or len(details["input"]) < details["ctx"]["min_length"]
    ]


def describe(model: type[BaseModel], details: ErrorDetails) -> str:
    """One finding about `model`: rule, value found, remedy."""
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
    """The fields of the model at a location; none where there is no model."""
    annotation: Any = model
    for parent in parents:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(parent))
            annotation = field.annotation if field else None
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
    fields = annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else {}
    return {field.alias or name: field for name, field in fields.items()}

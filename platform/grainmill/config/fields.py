"""Types of settings, by their place in a JSON schema."""

from collections.abc import Iterator, Mapping
from typing import Any


def is_text(schema: Mapping[str, Any], location: tuple[str | int, ...]) -> bool:
    """Return True if the setting at a location is text (or null), and can be no number, list or section."""
    kinds = {kind for found in _at(schema, schema, location) for kind in _kinds(found)}
    return "string" in kinds and kinds <= {"string", "null"}


def takes_null(schema: Mapping[str, Any], location: tuple[str | int, ...]) -> bool:
    """Return True if the setting at a location can be null."""
    return any("null" in _kinds(found) for found in _at(schema, schema, location))


def _at(root: Mapping[str, Any], schema: Any, location: tuple[str | int, ...]) -> Iterator[Mapping[str, Any]]:
    """Every schema that a value at a location can have; none where the location is unknown."""
    if not isinstance(schema, Mapping):  # additionalProperties: true or false
        return
    if "$ref" in schema:
        yield from _at(root, root["$defs"][schema["$ref"].rpartition("/")[2]], location)
        return
    options = [option for key in ("anyOf", "oneOf", "allOf") for option in schema.get(key, ())]
    for option in options:
        yield from _at(root, option, location)
    if not location:
        if not options:
            yield schema
        return
    step, *rest = location
    if isinstance(step, int):
        listed = schema.get("prefixItems", ())
        below = listed[step] if step < len(listed) else schema.get("items")
    else:
        below = schema.get("properties", {}).get(step, schema.get("additionalProperties"))
    yield from _at(root, below, tuple(rest))


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """Names of the JSON types of a schema without unions; "any" if it does not say."""
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return {"string" if isinstance(value, str) else "null" if value is None else "any" for value in values}
    kinds = schema.get("type", "any")
    return {kinds} if isinstance(kinds, str) else set(kinds)

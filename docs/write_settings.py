"""Print `docs/settings.md`, the reference of all settings, from the classes that define them: `make schema`."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from grainmill import trainable
from grainmill.config.experiment import Experiment
from grainmill.config.space import Parameter

METHOD, FINETUNING = trainable.find("multigrain"), trainable.find("multigrain-exponent")
PAGES: tuple[tuple[str, type[BaseModel], str, str], ...] = (
    ("The experiment file", Experiment, "", "The sections `data` and `base` follow below; their settings depend on "
     "`trainable`."),
    ("A parameter of `space`", Parameter, "", "Exactly one of `uniform`, `loguniform`, `int` and `choice`."),
    ("Images", METHOD.Data, "data.", "For `trainable: multigrain` and `multigrain-exponent`."),
    ("`trainable: multigrain`", METHOD.Spec, "base.", "One training of a MultiGrain network."),
    ("`trainable: multigrain-exponent`", FINETUNING.Spec, "base.", "Fine-tuning of p* of a trained network."),
    ("`grainmill evaluate --set`", METHOD.Evaluation, "", "`on` is given as `--on BENCHMARK=PATH`."),
)  # fmt: skip
KINDS = {"boolean": "`true`, `false`", "string": "text", "object": "mapping"}
"""Words for types of JSON schema; the others are used as they are."""
SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
LARGEST = 2**31
"""Bounds beyond this, such as those of seeds, are not shown."""
INTRODUCTION = """\
# Every setting

This page is generated from the code by `make schema`; a test checks that it is current.

A setting is named by its dotted path. In the file, sections are nested; `--set base.epochs=20` on the command line
and the keys of `space` use the path (those of `space` without `base.`). An unknown key is an error. An empty default
means that the setting is optional or has no default; its description says what applies then.

Descriptions of the method name the source of each default:

| tag | source |
|---|---|
| [P ...] | the paper, [arXiv:1902.05509v2](https://arxiv.org/abs/1902.05509v2): equation, table, figure or section |
| [R] | the behaviour of the authors' released code, where the paper is silent |
| [-] | our own choice |

Where a number follows, it is the published one: `[P Table 2: 224]`. The defaults together are the paper's setting:
lambda 0.5, p = 3, three copies of each image, augmentation `full`. The [glossary](glossary.md) explains the symbols.
"""


def rows(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield path, allowed values, default and description of each setting of a JSON schema, nested ones included."""
    for name, field in schema["properties"].items():
        target = _target(field, definitions)
        text = field.get("description") or target.get("description") or ""
        text = " ".join(text.split()).replace("|", "\\|")
        nested = "properties" in target
        yield prefix + name, "" if nested else _values(field, definitions), _default(field.get("default")), text
        if nested:
            yield from rows(target, definitions, f"{prefix}{name}.")


def _target(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema that a field refers to; of an optional field, the schema of its value."""
    choices = [one for one in field.get("anyOf", ()) if one.get("type") != "null"]
    field = choices[0] if len(choices) == 1 else field
    return definitions[field["$ref"].rpartition("/")[2]] if "$ref" in field else field


def _values(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Describe the values that a schema allows, such as `integer >= 1`."""
    field = _target(field, definitions)
    if "anyOf" in field:
        return " or ".join(_values(one, definitions) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "prefixItems" in field:
        return f"[{', '.join(_values(one, definitions) for one in field['prefixItems'])}]"
    if "items" in field:
        return f"list of {_values(field['items'], definitions)}"
    kinds = field.get("type", "")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    bounds = [f"{SIGNS[key]} {field[key]:.4g}" for key in SIGNS if key in field and abs(field[key]) < LARGEST]
    return " ".join([" or ".join(KINDS.get(kind, kind) for kind in kinds), ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    if value is None or isinstance(value, dict | list | tuple):
        return ""
    return (
        f"`{str(value).lower() if isinstance(value, bool) else f'{value:.4g}' if isinstance(value, float) else value}`"
    )


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    for title, model, prefix, note in PAGES:
        schema = model.model_json_schema()
        table = [f"| `{path}` | {values} | {default} | {text} |" for path, values, default, text in
                 rows(schema, schema.get("$defs", {}), prefix)]  # fmt: skip
        parts.append(
            "\n".join([f"## {title}\n\n{note}\n", "| setting | values | default | |", "|---|---|---|---|", *table, ""])
        )
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")

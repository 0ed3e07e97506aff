"""YAML as plain data with the line of every key; the only module that reads and writes YAML."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from grainmill.config import fields
from grainmill.errors import ExperimentError, Problem

MAX_BYTES = 1_000_000
Location = tuple[str | int, ...]
"""Keys and indices from the root of a tree."""
Overrides = Sequence[str] | Mapping[str, Any]
"""Changes to settings: plain values by dotted path, or texts `a.b=value`.

The value in a text is YAML, but if the setting is text, it is taken as typed, save `null` and quotes around the whole.
"""
Schema = Mapping[str, Any]
"""JSON schema of settings."""


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Plain data as YAML, with the keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def read_plain(file: Path) -> Any:
    """A YAML file of another program as plain data; aliases are allowed.

    Raises:
        ExperimentError: the file cannot be read.
    """
    try:
        return yaml.safe_load(file.read_bytes())
    except OSError as error:
        message = f"the file must be readable, but is not ({error.strerror})"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        message = f"the file must be valid YAML, but: {' '.join(str(error).split())}"
    raise ExperimentError(str(file), [Problem(None, "", message)])


_QUOTED = re.compile(r'"([^"\\]|\\.)*"|\'([^\']|\'\')*\'', re.DOTALL)
_TEXT = "tag:yaml.org,2002:str"
_OCTAL = re.compile(r"[-+]?0[0-9_]+")


class _Loader(yaml.SafeLoader):
    """Reads YAML in which 1e-4 is a number, without aliases: a small file must not stand for a large tree."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not supported; write the value out", problem_mark=mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number."""


for _both in (_Loader, _Dumper):
    _both.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


class Document:
    """A file as plain data, the line of each key, and the problems found so far."""

    def __init__(self, file: Path | None) -> None:
        """Read a file; None makes an empty document, for settings that are given as overrides alone."""
        self.file = file or "the command line"
        self.problems: list[Problem] = []
        self.lines: dict[Location, int] = {}
        self.tree: dict[str, Any] = {}
        self.overridden: set[Location] = set()
        self._unread: set[str] = set()
        if file is None:
            return
        try:
            if (size := file.stat().st_size) > MAX_BYTES:
                rule = f"the file must not be larger than {MAX_BYTES} bytes"
                self.add((), f"{rule}, got {size}; images belong in folders")
                return
            tree, self.lines, self.problems = _read(file.read_bytes().decode())
            self._unread = {problem.key for problem in self.problems}
        except OSError as error:
            self.add((), f"the file must be readable, but is not ({error.strerror})")
        except UnicodeDecodeError as error:
            self.add((), f"the file must be UTF-8 text, but is not ({error.reason} at byte {error.start}); save it so")
        else:
            if isinstance(tree, dict):
                self.tree = tree
            elif not self.problems:
                self.add((), f"the file must hold keys and values, got {type(tree).__name__}; see `grainmill schema`")

    def apply(self, overrides: Overrides, schema: Schema) -> None:
        """Change the tree; a malformed change becomes a problem."""
        if isinstance(overrides, Mapping):
            for path, value in overrides.items():
                self._set(path, os.fspath(value) if isinstance(value, os.PathLike) else deepcopy(value))
        else:
            for text in overrides:
                self.override(text, schema)

    def override(self, text: str, schema: Schema) -> None:
        """Apply one change, `a.b=value`."""
        path, equals, value = text.partition("=")
        if not equals or not path:
            self.add((), f"--set needs key=value, got {text!r}")
            return
        plain, problems = _typed(value, schema, _key(path))
        for problem in problems:
            self.add((), f"--set {path}: {problem.message.replace('the file', 'the value', 1)}")
        if not problems:
            self._set(path, plain)

    def _set(self, path: str, value: Any) -> None:
        """Put a value at a dotted path."""
        key = _key(path)
        branch = self.tree
        for step in key[:-1]:
            branch = branch.setdefault(step, {})
            if not isinstance(branch, dict):
                self.add((), f"--set {path}: {step} is a value, not a section")
                return
        branch[key[-1]] = value
        self.lines = {place: line for place, line in self.lines.items() if place[: len(key)] != key}
        self.overridden.add(key)

    def add(self, location: Location, message: str) -> None:
        """Add a problem, with the line of its key or of the nearest key above that the file holds.

        A key that could not be read has its problem already.
        """
        if location and dotted(location) in self._unread:
            return
        above = [location[:length] for length in range(len(location), 0, -1)]
        known = next((place for place in above if place in self.lines), None)
        if self.overridden.intersection(above):
            known = None
        self.problems.append(Problem(self.lines[known] if known else None, dotted(location), message))

    def stop_if_wrong(self) -> None:
        """Raise ExperimentError if there is a problem."""
        if self.problems:
            raise ExperimentError(str(self.file), self.problems)


def _key(path: str) -> tuple[str, ...]:
    """The keys of a dotted path."""
    section, _, rest = path.partition(".")
    # A searched parameter's name is itself a dotted path: everything behind `space.` is one key.
    return (section, rest) if section == "space" and rest else tuple(path.split("."))


def _typed(value: str, schema: Schema, key: Location) -> tuple[Any, list[Problem]]:
    """The value that a person typed for a setting, and the problems."""
    text = fields.is_text(schema, key)
    if text and not _QUOTED.fullmatch(value):
        return (None if value == "null" and fields.takes_null(schema, key) else value), []
    plain, _, problems = _read(value, lambda location: fields.is_text(schema, (*key, *location)))
    return (value, []) if text and problems else (plain, problems)


def _read(
    text: str, is_text: Callable[[Location], bool] = lambda _: False
) -> tuple[Any, dict[Location, int], list[Problem]]:
    """Plain data, the line of each key, and the problems; words at places that are text are taken as typed."""
    lines: dict[Location, int] = {}
    problems: list[Problem] = []
    tree = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        tree = _plain(loader, node, (), lines, problems, is_text) if node else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        problems.append(Problem(line, "", f"the file must be valid YAML: {error.problem}"))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"the file must be valid YAML: character #x{error.character:04x}: {error.reason}"
        problems.append(Problem(line, "", message))
    except RecursionError:
        problems.append(Problem(None, "", "the file must not be nested as deeply as this"))
    return tree, lines, problems


def _plain(
    loader: _Loader,
    node: yaml.Node,
    location: Location,
    lines: dict[Location, int],
    problems: list[Problem],
    is_text: Callable[[Location], bool],
) -> Any:
    lines.setdefault(location, node.start_mark.line + 1)
    if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
        message = f"the tag {node.tag!r} is not supported; remove it"
        raise yaml.MarkedYAMLError(problem=message, problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        items = enumerate(node.value)
        return [_plain(loader, item, (*location, index), lines, problems, is_text) for index, item in items]
    if not isinstance(node, yaml.MappingNode):
        text = is_text(location)
        if not text and (ambiguity := _ambiguity(node)):
            problems.append(Problem(node.start_mark.line + 1, dotted(location), ambiguity))
            return node.value
        return _scalar(loader, node, text)
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
        key = _scalar(loader, key_node, text=True)
        place = (*location, key)
        line = key_node.start_mark.line + 1
        if key in tree:
            message = f"a key must stand once, but is on line {lines[place]} too; remove one"
            problems.append(Problem(line, dotted(place), message))
        lines[place] = line
        tree[key] = _plain(loader, value_node, place, lines, problems, is_text)
    return tree


def _scalar(loader: _Loader, node: yaml.Node, text: bool) -> Any:
    # A tag of one's own is not text.
    text = text and node.tag in (_TEXT, loader.resolve(yaml.ScalarNode, node.value, (True, False)))  # type: ignore[no-untyped-call]
    try:
        value = str(node.value) if text else loader.construct_object(node)
        str(value).encode()  # half characters cannot be printed, nor be part of a path
    except ValueError as error:
        message = f"{node.value[:40]!r} cannot be read ({error})"
        raise yaml.MarkedYAMLError(problem=message, problem_mark=node.start_mark) from None
    return value


def _ambiguity(node: Any) -> str | None:
    """Say what is wrong with a word that YAML takes for something else than people who read it."""
    kind = node.tag.rpartition(":")[2]
    if node.style is not None:  # quoted
        return None
    if kind == "bool" and node.value.lower() not in ("true", "false"):
        return f"{node.value} can be a word or a truth value; put it in quotes, or write true or false"
    if kind in ("int", "float") and (":" in node.value or _OCTAL.fullmatch(node.value)):
        base = "base 60" if ":" in node.value else "base 8"
        return f"{node.value} can be text or a number of {base}; put it in quotes, or write a decimal number"
    return f"{node.value} can be text or a date; put it in quotes" if kind == "timestamp" else None


def dotted(location: Location) -> str:
    """A location as a dotted path."""
    return ".".join(map(str, location))

"""YAML as plain data with the line of every key; the only module that reads and writes YAML."""

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from grainmill.errors import ExperimentError, Problem

MAX_BYTES = 1_000_000
Location = tuple[str | int, ...]
"""Keys and indices from the root of a tree."""
Overrides = Sequence[str] | Mapping[str, Any]
"""Changes to settings: texts `a.b=value` whose value is YAML, or plain values by dotted path."""


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
        if file is None:
            return
        try:
            if (size := file.stat().st_size) > MAX_BYTES:
                rule = f"the file must not be larger than {MAX_BYTES} bytes"
                self.add((), f"{rule}, got {size}; images belong in folders")
                return
            tree, self.lines, self.problems = _read(file.read_bytes().decode())
        except OSError as error:
            self.add((), f"the file must be readable, but is not ({error.strerror})")
        except UnicodeDecodeError as error:
            self.add((), f"the file must be UTF-8 text, but is not ({error.reason} at byte {error.start}); save it so")
        else:
            if isinstance(tree, dict):
                self.tree = tree
            elif not self.problems:
                self.add((), f"the file must hold keys and values, got {type(tree).__name__}; see `grainmill schema`")

    def apply(self, overrides: Overrides) -> None:
        """Change the tree; a malformed change becomes a problem."""
        if isinstance(overrides, Mapping):
            for path, value in overrides.items():
                self._set(path, os.fspath(value) if isinstance(value, os.PathLike) else deepcopy(value))
        else:
            for text in overrides:
                self.override(text)

    def override(self, text: str) -> None:
        """Apply one change, `a.b=value`."""
        path, equals, value = text.partition("=")
        if not equals or not path:
            self.add((), f"--set needs key=value, got {text!r}")
            return
        plain, _, problems = _read(value)
        for problem in problems:
            self.add((), f"--set {path}: {problem.message.replace('the file', 'the value', 1)}")
        if not problems:
            self._set(path, plain)

    def _set(self, path: str, value: Any) -> None:
        """Put a value at a dotted path."""
        section, _, rest = path.partition(".")
        # A searched parameter's name is itself a dotted path: everything behind `space.` is one key.
        key = (section, rest) if section == "space" and rest else tuple(path.split("."))
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
        """Add a problem, with the line of its key or of the nearest key above that the file holds."""
        above = [location[:length] for length in range(len(location), 0, -1)]
        known = next((place for place in above if place in self.lines), None)
        if self.overridden.intersection(above):
            known = None
        self.problems.append(Problem(self.lines[known] if known else None, dotted(location), message))

    def stop_if_wrong(self) -> None:
        """Raise ExperimentError if there is a problem."""
        if self.problems:
            raise ExperimentError(str(self.file), self.problems)


def _read(text: str) -> tuple[Any, dict[Location, int], list[Problem]]:
    """Plain data, the line of each key, and the problems."""
    lines: dict[Location, int] = {}
    problems: list[Problem] = []
    tree = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        tree = _plain(loader, node, (), lines, problems) if node else None
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
    loader: _Loader, node: yaml.Node, location: Location, lines: dict[Location, int], problems: list[Problem]
) -> Any:
    lines.setdefault(location, node.start_mark.line + 1)
    if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
        message = f"the tag {node.tag!r} is not supported; remove it"
        raise yaml.MarkedYAMLError(problem=message, problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*location, index), lines, problems) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(loader, node)
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
        key = str(_scalar(loader, key_node))
        place = (*location, key)
        line = key_node.start_mark.line + 1
        if key in tree:
            message = f"a key must stand once, but is on line {lines[place]} too; remove one"
            problems.append(Problem(line, dotted(place), message))
        lines[place] = line
        tree[key] = _plain(loader, value_node, place, lines, problems)
    return tree


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    try:
        value = loader.construct_object(node)
        str(value).encode()  # half characters cannot be printed, nor be part of a path
    except ValueError as error:
        message = f"{node.value[:40]!r} cannot be read ({error})"
        raise yaml.MarkedYAMLError(problem=message, problem_mark=node.start_mark) from None
    return value


def dotted(location: Location) -> str:
    """A location as a dotted path."""
    return ".".join(map(str, location))

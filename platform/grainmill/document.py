"""A YAML file as plain data, with the line of every key; the only reader and writer of YAML."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from grainmill.errors import ExperimentError, Problem

MAX_BYTES = 1_000_000
Location = tuple[str | int, ...]
"""Keys and indices from the root of a tree."""


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Plain data as YAML, keys in their order."""
    return yaml.safe_dump(tree, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML without aliases (a small file must not stand for a large tree), in which 1e-4 is a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not supported; write the value out", problem_mark=mark
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class Document:
    """The file as plain data, the line of each key, and what is wrong so far."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.lines: dict[Location, int] = {}
        self.tree: dict[str, Any] = {}
        try:
            content = file.read_bytes()
        except OSError as error:
            self.add((), f"the file must be readable, but is not ({error.strerror})")
            return
        if len(content) > MAX_BYTES:
            self.add((), f"the file must be smaller than {MAX_BYTES} bytes, got {len(content)}")
            return
        self._parse(content)

    def _parse(self, content: bytes) -> None:
        try:
            loader = _Loader(content.decode())
            node = loader.get_single_node()
            tree = self._plain(loader, node, ()) if node else None
        except UnicodeDecodeError as error:
            self.add((), f"the file must be UTF-8 text ({error.reason} at byte {error.start})")
            return
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else None
            self.problems.append(Problem(line, "", f"the file must be valid YAML: {error.problem}"))
            return
        except yaml.YAMLError as error:
            self.add((), f"the file must be valid YAML: {error}")
            return
        if isinstance(tree, dict):
            self.tree = tree
        else:
            self.add((), f"the file must hold keys and values, got {type(tree).__name__}; see `grainmill schema`")

    def _plain(self, loader: _Loader, node: yaml.Node, location: Location) -> Any:
        self.lines.setdefault(location, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(loader, item, (*location, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        tree = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node))
            place = (*location, key)
            if key in tree:
                first = self.lines[place]
                self.problems.append(
                    Problem(
                        key_node.start_mark.line + 1,
                        dotted(place),
                        f"a key must stand once, but is on line {first} too; remove one",
                    )
                )
            self.lines[place] = key_node.start_mark.line + 1
            tree[key] = self._plain(loader, value_node, place)
        return tree

    def override(self, text: str) -> None:
        """Apply one `a.b=value`."""
        path, equals, value = text.partition("=")
        if not equals or not path:
            self.add((), f"--set needs key=value, got {text!r}")
            return
        try:
            plain = yaml.load(value, _Loader)  # noqa: S506 - a safe loader
        except yaml.YAMLError as error:
            self.add((), f"--set {path}: the value must be valid YAML: {error}")
            return
        section, _, rest = path.partition(".")
        # A searched parameter's name is itself a dotted path: everything behind `space.` is one key.
        key = (section, rest) if section == "space" and rest else tuple(path.split("."))
        branch = self.tree
        for step in key[:-1]:
            branch = branch.setdefault(step, {})
            if not isinstance(branch, dict):
                self.add((), f"--set {path}: {step} is a value, not a section")
                return
        branch[key[-1]] = plain
        self.lines = {place: line for place, line in self.lines.items() if place[: len(key)] != key}

    def add(self, location: Location, message: str) -> None:
        """Note a problem at a key, or at the nearest one above it that the file holds."""
        known = next(
            (location[:length] for length in range(len(location), 0, -1) if location[:length] in self.lines), None
        )
        self.problems.append(Problem(self.lines[known] if known else None, dotted(location), message))

    def stop_if_wrong(self) -> None:
        """Raise ExperimentError if there is a problem."""
        if self.problems:
            raise ExperimentError(str(self.file), self.problems)


def dotted(location: Location) -> str:
    """A location as a dotted path."""
    return ".".join(map(str, location))

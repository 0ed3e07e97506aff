"""The rules of the test tree: where shared code lies, what a test may reach, and what starts Ray or a server."""

import ast
import importlib.machinery
import re
import sys
import tomllib

import pytest
from commands import ROOT, SUPPORT

TESTS = ROOT / "tests"
FILES = sorted(path for path in TESTS.rglob("*.py") if path.parent not in (SUPPORT, TESTS / "benchmarks"))
PACKAGES = {"grainmill": ROOT / "platform", "multigrain": ROOT / "trainables"}
PUBLIC = {"_asdict", "_exit", "_fields", "_make", "_replace"}
"""Names with an underscore that Python documents."""


def name(path):
    return str(path.relative_to(TESTS))


def test_only_the_folder_of_shared_code_is_on_the_path():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["pythonpath"] == ["tests/support"]  # with `tests` on it, tests/grainmill would hide the package


@pytest.mark.parametrize("path", sorted(SUPPORT.glob("*.py")), ids=lambda path: path.stem)
def test_a_module_of_shared_code_hides_no_installed_one(path):
    assert path.stem not in sys.stdlib_module_names
    others = [place for place in sys.path if place != str(SUPPORT)]
    assert importlib.machinery.PathFinder.find_spec(path.stem, others) is None


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_test_file_imports_another(path):
    assert re.findall(r"^\s*(?:from|import) ((?:test_|conftest\b)\w*)", path.read_text(), re.MULTILINE) == []


@pytest.mark.parametrize("path", [path for path in FILES if TESTS / "integration" not in path.parents], ids=name)
def test_what_starts_ray_or_a_server_is_below_integration(path):
    starts = r"\bray\.init\(|\bserve\.run\(|\bcluster_utils\b|\bTrackingServer\(|\bPostgres\(|\brun_whole\("
    if path.name != "test_tests.py":
        assert re.findall(starts, path.read_text()) == []


def is_private(word):
    return word.startswith("_") and not word.startswith("__") and word not in PUBLIC


def is_module(dotted):
    path = PACKAGES[dotted.partition(".")[0]].joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def private_uses(tree):
    """(line, dotted name) of the private names of our packages that a test imports, reaches or replaces.

    The dotted name begins with `?` where the object is none that the test has imported.
    """
    imported = {}  # name here -> module that it comes from
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in PACKAGES:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                imported[alias.asname or alias.name] = whole if is_module(whole) else node.module
                if is_private(alias.name):
                    yield node.lineno, whole
        elif isinstance(node, ast.Import):
            imported |= {alias.asname: alias.name for alias in node.names if alias.asname}

    def owner(node):
        while isinstance(node, ast.Attribute):
            node = node.value
        return imported.get(node.id, f"?{node.id}") if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.lineno, f"{owner(node)}.{node.attr}"
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("setattr", "delattr", "object"):
            words = [one.value for one in node.args[:2] if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            for word in words:
                if is_private(word.rpartition(".")[2]):
                    yield node.lineno, f"{owner(node.args[0]) if len(words) < len(node.args[:2]) else ''}.{word}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != TESTS], ids=name)
def test_no_test_reaches_a_private_name_of_another_room(path):
    """A test may reach those of the room that it mirrors, and one that mirrors no room none at all."""
    *folders, file = path.relative_to(TESTS).with_suffix("").parts
    room = [*folders, file.removeprefix("test_")][:2] if folders[0] in PACKAGES else None
    found = []
    for line, dotted in private_uses(ast.parse(path.read_text())):
        own = dotted.split(".")[:2] == room
        unknown = dotted.startswith("?") and (room or dotted.startswith(("?self.", "?cls.")))
        foreign = dotted.partition(".")[0] not in (*PACKAGES, "?") and not dotted.startswith("?")
        if not (own or unknown or foreign):
            found.append(f"line {line}: {dotted}")
    assert found == []

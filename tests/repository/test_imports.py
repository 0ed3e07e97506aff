"""No two modules import each other, directly or through others, at the top of a file or inside a function."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from commands import ROOT

PACKAGES = {"grainmill": "platform", "multigrain": "trainables"}


def modules():
    """Name of each module of both packages -> its file."""
    return {
        ".".join(path.relative_to(ROOT / root).with_suffix("").parts).removesuffix(".__init__"): path
        for package, root in PACKAGES.items()
        for path in (ROOT / root / package).rglob("*.py")
    }


def imported(path, known):
    """Names of the known modules that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            of_modules = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= of_modules if len(of_modules) == len(node.names) else of_modules | {node.module}
    return found & known


def test_there_is_no_circle_of_imports():
    files = modules()
    assert len(files) > 100
    graph = {name: imported(path, files.keys()) - {name} for name, path in files.items()}
    assert sum(map(len, graph.values())) > 300
    list(TopologicalSorter(graph).static_order())


def test_a_circle_is_found(tmp_path):
    (tmp_path / "a.py").write_text("def late():\n    from x import b, c\n")
    (tmp_path / "b.py").write_text("from x.a import late\n")
    known = {"x", "x.a", "x.b"}
    graph = {f"x.{name}": imported(tmp_path / f"{name}.py", known) for name in ("a", "b")}
    assert graph == {"x.a": {"x", "x.b"}, "x.b": {"x.a"}}
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())

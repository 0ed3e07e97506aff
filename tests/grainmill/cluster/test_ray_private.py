"""Private names of Ray are used in one module alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ALLOWED = ROOT / "platform" / "grainmill" / "cluster" / "ray_private.py"
PRIVATE_MODULE = re.compile(r"ray(\.\w+)*\.(_\w+|core\.generated)(\.|$)")
NAMEDTUPLE = {"_asdict", "_fields", "_make", "_replace"}


def private_names(source):
    """Lines of a module that use a private name of Ray, where the module imports Ray."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {}
    for node in imports:
        if isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}": node.lineno for alias in node.names}
        else:
            modules |= {alias.name: node.lineno for alias in node.names}
    if not any(name.partition(".")[0] == "ray" for name in modules):
        return set()
    found = {line for name, line in modules.items() if PRIVATE_MODULE.match(name)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name) if re.match("_[a-z]", name) and name not in NAMEDTUPLE:
                found.add(node.lineno)
            case ast.keyword(arg=str(name)) | ast.Constant(value=str(name)) if re.fullmatch("_[a-z][a-z_]+", name):
                found.add(node.lineno)
    return found


def test_no_other_module_uses_a_private_name_of_ray():
    files = [path for root in ("platform", "trainables") for path in (ROOT / root).rglob("*.py") if path != ALLOWED]
    assert len(files) > 100
    assert {str(path): lines for path in files if (lines := private_names(path.read_text()))} == {}
    assert private_names(ALLOWED.read_text())


@pytest.mark.parametrize(
    "use",
    [
        "from ray._private import services",
        "from ray.train.v2._internal.execution import context",
        "from ray.core.generated import gcs_pb2",
        "from ray.util import _private",
        "import ray._raylet",
        "handle._actor_id",
        "ray._private.state",
        "Factory([{}], _soft_target_node_id=1)",
        "options = {'_soft_target_node_id': 1}",
    ],
)
def test_each_kind_of_use_is_found(use):
    assert private_names(f"import ray\n{use}\n") == {2}
    assert private_names("import ray\nself._own = row._replace(a='_A b')\n") == set()

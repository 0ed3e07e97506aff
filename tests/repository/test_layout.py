import json
import platform
import re
import tomllib

import pytest
from commands import ROOT, python
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from grainmill import trainable
from grainmill.config.experiment import json_schema, load


@pytest.mark.parametrize("root", ["platform", "trainables"])
def test_a_source_root_is_no_package_and_holds_no_module(root):
    # `platform` would hide Python's own module of that name.
    assert list((ROOT / root).glob("*.py")) == []
    packages = [path.name for path in (ROOT / root).iterdir() if (path / "__init__.py").exists()]
    assert packages == [{"platform": "grainmill", "trainables": "multigrain"}[root]]


def test_the_tests_are_no_package():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


USE_PLATFORM = "import platform, uuid; print(platform.system(), uuid.UUID(int=7).int)"


@pytest.mark.parametrize("path", ["", ".", str(ROOT)], ids=["no path", "relative path", "absolute path"])
def test_pythons_own_platform_module_is_found_from_the_root(path):
    assert python("-c", USE_PLATFORM, PYTHONPATH=path).split() == [platform.system(), "7"]
    # With -m the working directory comes first on the path, too.
    assert python("-m", "platform", PYTHONPATH=path).startswith(platform.system())


def test_the_committed_schema_is_that_of_the_code():
    committed = json.loads((ROOT / "search_spaces" / "schema.json").read_text())
    assert committed == json_schema(trainable.find("multigrain")), "run `make schema`"


def test_the_demo_is_right():
    load(ROOT / "search_spaces" / "demo.yaml")


def test_every_declared_dependency_is_pinned_to_a_version_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version
        for name, equals, version in (line.partition("==") for line in lines if line and not line.startswith("#"))
        if equals
    }
    declared = [
        *project["dependencies"],
        *(text for group in project["optional-dependencies"].values() for text in group),
    ]
    assert len(declared) > 20
    for text in declared:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(version), f"{text}, but constraints.txt pins {version}"


def test_each_line_of_the_constraints_pins_one_version_exactly():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line)] == []
    names = [canonicalize_name(line.partition("==")[0]) for line in lines]
    assert len(set(names)) == len(names)


HEAVY = (
    "heavy = {'mlflow', 'optuna', 'ray', 'torch', 'torchvision', 'pandas', 'sklearn', 'matplotlib'} & set(sys.modules)"
)


def test_the_command_checks_a_file_without_loading_anything_heavy():
    code = f"""
import sys
import grainmill.cli.app
grainmill.cli.app.app(["validate", "search_spaces/demo.yaml"], standalone_mode=False)
{HEAVY}
print(sorted(heavy))
"""
    assert python("-c", code).splitlines()[-1] == "[]"


def test_the_methods_settings_are_read_without_torch():
    code = f"""
import sys
import multigrain, multigrain.data.folders, multigrain.config.training, multigrain.trainable
assert multigrain.MultiGrainSpec().epochs == 120
{HEAVY}
print(sorted(heavy))
"""
    assert python("-c", code).splitlines()[-1] == "[]"

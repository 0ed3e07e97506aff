"""The documentation is current: links, settings, rooms, checks, and the form of every block."""

import ast
import re
import subprocess
import sys
import tomllib

import pages
import pytest
import yaml
from commands import ROOT
from pages import NOT_RUN, PAGES
from typer.main import get_command

from grainmill.cli.app import app
from grainmill.config.experiment import load


def all_blocks(*languages):
    return [pytest.param(block, id=str(block)) for page in PAGES for block in pages.blocks(page, *languages)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_internal_link_resolves(page):
    for link in pages.links(page):
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in pages.anchors(file), f"{link}: no such heading; there are {sorted(pages.anchors(file))}"


def test_every_page_is_reached_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in pages.links(ROOT / "README.md")}
    assert set(PAGES) - {ROOT / "README.md"} <= linked


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_page_of_settings_is_that_of_the_code():
    written = subprocess.run(
        [sys.executable, ROOT / "docs" / "write_settings.py"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert (ROOT / "docs" / "settings.md").read_text() == written, "run `make schema`"


def test_the_rooms_of_the_architecture_page_are_those_of_the_import_contracts():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    page = ROOT / "docs" / "architecture.md"
    picture = pages.blocks(page, "mermaid")[0].text
    for contract in contracts:
        if contract["type"] != "layers":
            continue
        (package,) = contract["containers"]
        layers = [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]
        nodes = re.findall(rf'\b{package[0]}\d+\["([^"]+)"\]', picture)
        assert [node.split(" · ") for node in nodes] == layers
        table = pages.prose(page).split(f"| room of `{package}` |")[1].split("\n\n")[0]
        described = {room for row in table.splitlines()[2:] for room in re.findall(r"`(\w+)`", row.split("|")[1])}
        assert described == {room for layer in layers for room in layer} - {"__main__"}


def test_pre_commit_runs_what_make_check_runs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    checks = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert [hook["entry"] for hook in repository["hooks"]] == checks


@pytest.mark.parametrize("block", all_blocks("sh", "python"))
def test_what_is_not_run_has_a_reason(block):
    assert set(block.marks) <= {*NOT_RUN}


@pytest.mark.parametrize("block", all_blocks("yaml"))
def test_every_yaml_block_is_an_experiment_or_a_part_of_one(block, tmp_path):
    part = yaml.safe_load(block.text)
    whole = {"name": "part", "data": {"builtin": "digits"}, "objective": {"top1": "max"}, **part}
    file = tmp_path / "part.yaml"
    file.write_text(yaml.safe_dump(whole))
    load(file, here=False)


def invocations(block):
    """(command, arguments) of each line of a block that runs `grainmill`."""
    for line in block.commands:
        if line.startswith("grainmill "):
            words = pages.shlex.split(line)[1:]
            yield words[0], words[1:]


@pytest.mark.parametrize("block", all_blocks("sh"))
def test_every_shell_block_parses_and_its_commands_exist(block):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for name, arguments in invocations(block):
        get_command(app).commands[name].make_context(name, arguments)
    for line in block.commands:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("block", all_blocks("python"))
def test_every_python_block_parses(block):
    ast.parse(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_modules_and_files_named_in_the_text_exist(page):
    text = pages.prose(page)
    for name in re.findall(r"`grainmill (\w+)", text):
        assert name in get_command(app).commands
    if page.name == "CHANGELOG.md":
        return
    for module in re.findall(r"`python -m (tests\.benchmarks\.[a-z_]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists()
    for row in re.findall(r"^\| `([a-z]+)(?: --\w+)?` \|", text.split("## Quality")[0], re.MULTILINE):
        assert page.name != "benchmarks.md" or (ROOT / "tests" / "benchmarks" / f"{row}.py").exists()
    for path in re.findall(r"`((?:infra|search_spaces|docs|tests|examples|platform|trainables)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path

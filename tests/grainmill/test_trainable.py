import inspect
import sys

import pytest
from typer.testing import CliRunner

from grainmill import trainable
from grainmill.cli.app import app
from grainmill.config.experiment import load
from grainmill.errors import ExperimentError

TINY = """
from typing import Annotated, Any
from pydantic import BaseModel, ConfigDict, Field


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    epochs: int = 5
    slope: Annotated[float, Field(ge=0, le=2)] = 0.25


class Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    rows: int


class Evaluation(BaseModel):
    on: dict[str, str]


def metrics(data, files):
    return {"error": "min"}


def data_problems(data, progress, files):
    seen = list(progress(range(data.rows), "counting rows", data.rows))
    return [] if len(seen) > 1 else [f"there must be 2 rows or more, got {data.rows}"]


def worker_problems(spec, workers):
    return [("", f"one worker is enough, got {workers}")] if workers > 1 else []


def prepare(data, root, progress, files): ...
def sources(data, files): ...
def fit(spec, data, folder, heartbeat, files): ...
def load(folder): ...
def export(folder, out): ...
def evaluate(folder, settings, out, files): ...
def images(source, files): ...
def example(data, files): ...
"""
FILE = """\
name: line
trainable: somebody.tiny
data: {rows: 3}
space: {slope: {uniform: [0, 2]}}
objective: {error: min}
"""


@pytest.fixture
def somebody(tmp_path, monkeypatch):
    """A folder on the path with a package `somebody`, a stranger to us, with the trainable `tiny`."""
    package = tmp_path / "path" / "somebody"
    package.mkdir(parents=True)
    (package / "tiny.py").write_text(TINY)
    monkeypatch.syspath_prepend(package.parent)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "somebody"]:
        del sys.modules[name]


@pytest.fixture
def read(somebody):
    """An experiment with the trainable of a stranger, after replacements in its file."""

    def read(*replacements, progress=trainable.no_progress):
        text = FILE
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        file = somebody.parent / "file.yaml"
        file.write_text(text)
        return load(file, progress=progress)

    return read


def test_the_installed_trainables_are_found_by_name_and_by_path():
    assert "multigrain" in trainable.names()
    assert trainable.names() == sorted(trainable.names())
    found = trainable.find("multigrain")
    assert found.__name__ == "multigrain.trainable"
    assert trainable.find("multigrain.trainable") is found


def protocol_members(protocol):
    return {name for name in [*protocol.__annotations__, *vars(protocol)] if not name.startswith("_")}


def test_multigrain_has_all_that_the_mill_asks_of_a_trainable():
    members = protocol_members(trainable.Trainable)
    assert {"Spec", "Data", "metrics", "data_problems", "worker_problems", "prepare", "fit", "load"} < members
    found = trainable.find("multigrain")
    assert {name for name in members if not hasattr(found, name)} == set()
    for name in members - {"Spec", "Data", "Evaluation"}:
        asked = list(inspect.signature(getattr(trainable.Trainable, name)).parameters)
        assert list(inspect.signature(getattr(found, name)).parameters) == asked, name


@pytest.mark.parametrize(
    "name", ["multigrian", "multigrain.nothing", "nowhere.tiny", "", ".", ".tiny", "..tiny", "tiny.", "a b", "3"]
)
def test_a_name_that_stands_for_nothing_is_refused_with_the_installed_ones(name):
    with pytest.raises(LookupError) as caught:
        trainable.find(name)
    assert f"got {name!r}" in str(caught.value)
    assert "installed: multigrain" in str(caught.value)


@pytest.mark.parametrize("missing", ["Spec", "Data", "metrics", "sources", "fit", "load", "export", "example"])
def test_a_module_without_a_part_that_is_needed_is_refused(missing, somebody):
    (somebody / "half.py").write_text(TINY + f"\ndel {missing}\n")
    with pytest.raises(LookupError, match=rf"somebody\.half.* {missing}\b"):
        trainable.find("somebody.half")


def test_a_module_needs_neither_checks_nor_benchmarks_nor_images(somebody, read):
    optional = ("Evaluation", "data_problems", "worker_problems", "prepare", "evaluate", "images")
    (somebody / "short.py").write_text(TINY + "".join(f"\ndel {name}" for name in optional))
    short = trainable.find("somebody.short")
    data = short.Data(rows=1)
    assert (short.__name__, short.metrics(data, None)) == ("somebody.short", {"error": "min"})
    assert short.prepare(data, somebody, trainable.no_progress, None) is data
    assert short.data_problems(data, trainable.no_progress, None) == short.worker_problems(short.Spec(), 1) == []
    assert short.worker_problems(short.Spec(), 2) == [("", "this trainable trains on 1 worker, got 2")]
    assert short.Evaluation().model_dump() == {}
    with pytest.raises(ValueError, match="has no benchmarks"):
        short.evaluate(somebody, short.Evaluation(), somebody, None)
    with pytest.raises(ValueError, match="embeds no images"):
        short.images("photos", None)
    assert read(("somebody.tiny", "somebody.short")).data.rows == 3


@pytest.mark.parametrize("needed", ["no_such_package", "some.thing"])
def test_a_trainable_whose_own_import_fails_is_not_said_to_be_missing(needed, somebody):
    (somebody / "needy.py").write_text(f"import {needed}\n" + TINY)
    with pytest.raises(ModuleNotFoundError, match=needed.partition(".")[0]):
        trainable.find("somebody.needy")


def test_a_name_with_no_module_behind_it_makes_the_schema_command_fail():
    result = CliRunner(env={"COLUMNS": "9999"}).invoke(app, ["schema", "multigrian"])
    assert result.exit_code == 1
    assert "'multigrian'" in result.stderr
    assert result.stdout == ""


def test_untracked_items_pass_unchanged():
    items = iter("abc")
    assert trainable.no_progress(items, "title", 3) is items


def test_a_trainable_of_a_stranger_is_loaded_by_its_path(read):
    experiment = read()
    assert (experiment.base.epochs, experiment.data.rows) == (5, 3)
    assert experiment.reference == {"slope": 0.25}
    assert experiment.spec({"slope": 1.5}).slope == 1.5


def test_the_progress_of_a_trainable_s_own_check_is_tracked(read):
    tracked = []

    def progress(items, title, length):
        tracked.append((title, length))
        return items

    read(progress=progress)
    assert tracked == [("counting rows", 3)]


@pytest.mark.parametrize(
    ("replacement", "line", "key", "says"),
    [
        (("rows: 3", "rows: 1"), 3, "data", ["2 rows", "got 1"]),
        (("rows: 3", "columns: 3"), 3, "data.columns", ["unknown key"]),
        (("[0, 2]", "[0, 3]"), 4, "space.slope", ["equal to 2", "3.0"]),
        (("slope:", "slop:"), 4, "space.slop", ["'slope'"]),
        (("error: min", "error: max"), 5, "objective.error", ["smaller", "set min"]),
        (("error: min", "eror: min"), 5, "objective.eror", ["'error'"]),
    ],
)
def test_a_trainable_s_own_rules_are_told_with_their_place(read, replacement, line, key, says):
    with pytest.raises(ExperimentError) as caught:
        read(replacement)
    problem = next(problem for problem in caught.value.problems if problem.key == key)
    assert problem.line == line
    assert [part for part in says if part not in problem.message] == []


def test_a_trainable_s_own_rule_for_workers_is_told(read):
    with pytest.raises(ExperimentError, match="one worker is enough, got 2"):
        read(("objective", "resources: {workers: 2}\nobjective"))

import io
import os
from pathlib import Path
from typing import Annotated, NamedTuple

import pytest
from PIL import Image
from pydantic import Field, ValidationError
from s3_servers import SECRET
from typer.testing import CliRunner

from grainmill import trainable
from grainmill.cli.app import app
from grainmill.config.experiment import json_schema, load
from grainmill.config.section import Section
from grainmill.config.validation import checked_settings
from grainmill.config.yaml_document import to_yaml
from grainmill.errors import ExperimentError

DEMO = Path(__file__).parents[3] / "search_spaces" / "demo.yaml"
HEAD = "name: small\ndata: {builtin: shapes}\nobjective: {top1: max}\n"
ANY = object()
"""A place that is not checked."""


def more(text):
    """A right file of three lines, and `text` from line 4 on."""
    return HEAD + text + "\n"


def space(*parameters):
    """A right file of three lines, `space:` on line 4, and a parameter on each line from 5 on."""
    return more("\n  ".join(["space:", *parameters]))


def head(name="small", data="{builtin: shapes}", objective="{top1: max}"):
    return f"name: {name}\ndata: {data}\nobjective: {objective}\n"


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, in which an earlier run lies in the default storage folder."""
    folder = tmp_path / "here"
    run = folder / "grainmill-runs" / "small" / "run-1"
    run.mkdir(parents=True)
    (run / "done.json").write_text("{}")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def validate(here):
    """`grainmill validate` of a text; it must write nothing. The result is exit code, stdout and stderr."""

    def validate(content, *arguments):
        file = here.parent / "file.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return validate_file(here.parent, file, *arguments)

    return validate


def validate_file(folder, file, *arguments):
    before = tree(folder)
    result = CliRunner(env={"COLUMNS": "9999"}).invoke(app, ["validate", str(file), *arguments])
    assert tree(folder) == before
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def check_told(outcome, line, key, says):
    """Exit code 2, and one problem with its place and all parts of its message."""
    code, stdout, stderr = outcome
    assert (code, stdout) == (2, "")
    title, *problems = stderr.splitlines()
    assert title.endswith(": 1 problem")
    (problem,) = problems
    if line is not ANY:
        assert problem.startswith(f"  line {line}: ") if line else not problem.startswith("  line ")
    if key is not ANY:
        place = f"  line {line}: " if line else "  "
        assert problem.startswith(f"{place}{key}: " if key else f"{place}the file must ")
    assert [part for part in says if part not in problem] == []


class Bad(NamedTuple):
    text: str | bytes
    line: object
    key: object
    says: list[str]
    arguments: tuple[str, ...] = ()


MARGIN = "loss.weight: {uniform: [0.2, 0.8], when: {batch.repeats: %s}, otherwise: 1.0}"
REPEATS = "batch.repeats: {choice: [1, 3]}"
MORE_THAN_1_MB = HEAD + "#" * 1_000_000

BAD = {
    # Keys
    "unknown section": Bad(more("serach: {trials: 3}"), 4, "serach", ["unknown key", "'search'"]),
    "misspelt setting": Bad(more("base:\n  loss:\n    wieght: 1"), 6, "base.loss.wieght", ["unknown key", "'weight'"]),
    "key like no other": Bad(more("base: {loss: {zzz: 1}}"), 4, "base.loss.zzz", ["unknown key", "weight, margin"]),
    "misspelt kind": Bad(
        space("loss.weight: {unifrom: [0.2, 0.8]}"), 5, "space.loss.weight.unifrom", ["unknown key", "'uniform'"]
    ),
    "kind by its inner name": Bad(
        space("batch.repeats: {integer: [2, 3]}"), 5, "space.batch.repeats.integer", ["unknown key", "int"]
    ),
    "nested parameter": Bad(
        space("loss: {weight: {uniform: [0.2, 0.8]}}"), 5, "space.loss.weight", ["unknown key", "loguniform, int,"]
    ),
    "key with half a character": Bad(more('"\\ud800": 1'), 4, ANY, []),
    "no objective": Bad("name: small\ndata: {builtin: digits}\n", None, "objective", ["required"]),
    # Types
    "word for a number": Bad(more("base: {epochs: many}"), 4, "base.epochs", ["integer", "'many'", "default, 120"]),
    "fraction for a whole": Bad(more("base: {epochs: 1.5}"), 4, "base.epochs", ["integer", "1.5", "default, 120"]),
    "text for a number": Bad(more("base: {epochs: '3'}"), 4, "base.epochs", ["integer", "'3'", "default, 120"]),
    "truth for a number": Bad(more("search: {trials: true}"), 4, "search.trials", ["integer", "True", "default, 20"]),
    "number for a section": Bad(more("base: 3"), 4, "base", ["must", "3"]),
    "list for a section": Bad(more("space: [1]"), 4, "space", ["must", "[1]"]),
    "section left empty": Bad(more("search:"), 4, "search", ["must", "None"]),
    "number for a parameter": Bad(space("loss.weight: 3"), 5, "space.loss.weight", ["must", "3"]),
    "date for a number": Bad(more("base: {seed: 2026-10-10}"), 4, "base.seed", ["2026-10-10", "date", "quotes"]),
    "one bound": Bad(space("loss.weight: {uniform: [0.2]}"), 5, ANY, ["uniform"]),
    "three bounds": Bad(space("loss.weight: {uniform: [0.2, 0.5, 0.8]}"), 5, ANY, ["uniform", "2", "[0.2, 0.5, 0.8]"]),
    # Values
    "above the range": Bad(more("base: {loss: {weight: 1.5}}"), 4, "base.loss.weight", ["equal to 1", "1.5", "0.5"]),
    "below the range": Bad(more("search: {trials: 0}"), 4, "search.trials", ["equal to 1", "got 0", "20"]),
    "share of all": Bad(head(data="{builtin: digits, val_share: 1}"), 2, "data.val_share", ["less than 1", "got 1"]),
    "near an allowed word": Bad(more("search: {sampler: tpee}"), 4, "search.sampler", ["'tpee'", "did you mean 'tpe'"]),
    "no allowed word": Bad(
        more("search: {sampler: annealing}"),
        4,
        "search.sampler",
        ["'tpe', 'gp', 'nsga2', 'qmc', 'random' or 'grid'", "'annealing'"],
    ),
    "not a number": Bad(more("base: {loss: {beta: .nan}}"), 4, "base.loss.beta", ["finite number", "nan", "1.2"]),
    "infinity": Bad(more("base: {loss: {beta: 1e400}}"), 4, "base.loss.beta", ["finite number", "inf", "1.2"]),
    "search without a published value": Bad(
        space("evaluation.size: {choice: [224, 500]}"), 5, "space.evaluation.size", ["published value", "base"]
    ),
    "nan as a bound": Bad(space("model.p: {uniform: [1, .nan]}"), 5, "space.model.p.uniform.1", ["finite", "nan"]),
    "nan as a choice": Bad(space("model.p: {choice: [.nan, 3]}"), 5, "space.model.p.choice.0", ["finite", "nan"]),
    "batch of broken groups": Bad(
        more("base: {batch: {size: 500}}"), 4, "base.batch", ["batch.repeats", "500 and 3", "to 501"]
    ),
    # Names
    "name out of the folder": Bad(head(name="../x"), 1, "name", ["'../x'"]),
    "empty name": Bad(head(name="''"), 1, "name", ["''"]),
    "name of 300 letters": Bad(head(name="n" * 300), 1, "name", ["'nnn"]),
    "name of 65 letters": Bad(head(name="n" * 65), 1, "name", ["'nnn"]),
    "name with markup": Bad(head(name="<script>"), 1, "name", ["'<script>'"]),
    "name with a line break": Bad(head(name='"small\\n"'), 1, "name", ["'small\\n'"]),
    "hidden name": Bad(head(name=".small"), 1, "name", ["'.small'"]),
    "number for a name": Bad(head(name="3"), 1, "name", ["must be text", "got 3", "quotes"]),
    "truth for a name": Bad(head(name="true"), 1, "name", ["must be text", "got True", "quotes"]),
    "date for a name": Bad(head(name="2024-01-15"), 1, "name", ["2024-01-15", "date", "quotes"]),
    "time for a name": Bad(head(name="1:30"), 1, "name", ["1:30", "base 60", "quotes"]),
    "no for a name": Bad(head(name="no"), 1, "name", ["no can be", "quotes"]),
    "octal number": Bad(more("base: {epochs: 010}"), 4, "base.epochs", ["010", "base 8", "decimal"]),
    "negative octal number": Bad(more("base: {epochs: -0_7}"), 4, "base.epochs", ["-0_7", "base 8"]),
    "number of base 60": Bad(more("base: {optimizer: {rate: 1:30.5}}"), 4, "base.optimizer.rate", ["base 60"]),
    "on for text": Bad(more("tracking: {uri: on}"), 4, "tracking.uri", ["on can be", "quotes"]),
    "octal number in an override": Bad(HEAD, None, ANY, ["--set", "010", "base 8"], ("--set", "base.epochs=010")),
    "model name with a slash": Bad(more("tracking: {model: a/b}"), 4, "tracking.model", ["'a/b'"]),
    # YAML
    "key twice": Bad(more("name: other"), 4, "name", ["once", "line 1", "remove one"]),
    "setting twice": Bad(
        more("base:\n  epochs: 3\n  seed: 1\n  epochs: 4"), 7, "base.epochs", ["once", "line 5", "remove one"]
    ),
    "tab": Bad(more("base:\n\tepochs: 3"), 5, "", ["valid YAML", "'\\t'"]),
    "no colon": Bad(more("base"), 5, "", ["valid YAML", "':'"]),
    "open bracket": Bad(more("base: {epochs: 3"), 5, "", ["valid YAML", "'}'"]),
    "second document": Bad(more("---\nname: other"), 4, "", ["valid YAML", "another document"]),
    "control character": Bad(more("storage: a\0b"), 4, "", ["valid YAML", "x0000"]),
    "python object": Bad(more("base: !!python/object:os.system {}"), 4, ANY, ["python/object:os.system"]),
    "python call": Bad(
        more("base: {seed: !!python/object/apply:os.mkdir [made]}"), 4, ANY, ["python/object/apply:os.mkdir"]
    ),
    "python name": Bad(more("storage: !!python/name:os.getcwd x"), 4, ANY, ["python/name:os.getcwd"]),
    "tag of one's own": Bad(more("base: !mine {epochs: 3}"), 4, ANY, ["!mine"]),
    "aliases of aliases": Bad(
        more("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]"), 5, "", ["aliases are not supported", "write the value"]
    ),
    "merged section": Bad(
        more("a: &a {epochs: 3}\nbase: {<<: *a}"), 5, "", ["aliases are not supported", "write the value"]
    ),
    "thousands of brackets": Bad(more("base: " + "[" * 1000 + "]" * 1000), ANY, ANY, ["nested"]),
    "no such date": Bad(more("base: {seed: 2026-13-45}"), 4, ANY, ["2026-13-45"]),
    "no such integer": Bad(more("base: {seed: !!int abc}"), 4, ANY, ["abc"]),
    "endless integer": Bad(more("base: {seed: " + "1" * 5000 + "}"), 4, ANY, ["digits"]),
    "just a word": Bad("hello", None, "", ["keys and values", "str", "grainmill schema"]),
    "just a list": Bad("- a\n- b\n", None, "", ["keys and values", "list", "grainmill schema"]),
    "empty file": Bad("", None, "", ["keys and values", "grainmill schema"]),
    "more than 1 MB": Bad(MORE_THAN_1_MB, None, "", ["larger than 1000000", f"{len(MORE_THAN_1_MB)}"]),
    "not UTF-8": Bad("name: gr\u00e4ne\n".encode("latin-1"), None, "", ["UTF-8", "byte 8"]),
    "UTF-16": Bad(HEAD.encode("utf-16"), None, "", ["UTF-8", "byte 0"]),
    # Searched parameters
    "low above high": Bad(
        space("model.p: {uniform: [3, 1]}"), 5, "space.model.p", ["low < high", "[3.0, 1.0]", "swap"]
    ),
    "low is high": Bad(space("batch.size: {int: [504, 504]}"), 5, "space.batch.size", ["low < high", "[504, 504]"]),
    "logarithm of 0": Bad(
        space("loss.margin: {loguniform: [0, 1]}"), 5, "space.loss.margin", ["low > 0", "0.0", "use uniform"]
    ),
    "nothing to choose": Bad(space("model.p: {choice: []}"), 5, "space.model.p.choice", ["at least 1", "[]"]),
    "choice twice": Bad(space("model.p: {choice: [1, 3, 1]}"), 5, "space.model.p", ["differ", "[1, 3, 1]", "remove"]),
    "only a list to choose": Bad(space("model.p: {choice: [[1]]}"), 5, "space.model.p.choice.0", ["number", "[1]"]),
    "list to choose": Bad(space("model.p: {choice: [[1], 3]}"), 5, "space.model.p.choice.0", ["number", "[1]"]),
    "no kind": Bad(space("model.p: {}"), 5, "space.model.p", ["exactly one of uniform, loguniform, int", "none"]),
    "two kinds": Bad(
        space("model.p: {uniform: [1, 3], choice: [1, 3]}"), 5, "space.model.p", ["exactly one", "got uniform, choice"]
    ),
    "no setting": Bad(space("loss.wight: {uniform: [0.2, 0.8]}"), 5, "space.loss.wight", ["setting", "'loss.weight'"]),
    "a group of settings": Bad(space("loss: {uniform: [0.2, 0.8]}"), 5, "space.loss", ["must be a setting"]),
    "epochs": Bad(space("epochs: {int: [3, 9]}"), 5, "space.epochs", ["equal epochs", "set base.epochs"]),
    "when of a stranger": Bad(
        space(MARGIN % "[3]"), 5, "space.loss.weight", ["`when`", "got batch.repeats", "known: loss.weight"]
    ),
    "when of an impossible value": Bad(
        space(MARGIN % "[3, 7]", REPEATS), 5, "space.loss.weight", ["`when`", "batch.repeats", "[7]"]
    ),
    "when of no value": Bad(
        space(MARGIN % "[]", REPEATS), 5, "space.loss.weight.when.batch.repeats", ["at least 1", "[]"]
    ),
    "when of itself": Bad(
        space("model.p: {uniform: [1, 3], when: {model.p: [2]}, otherwise: 3.0}"), 5, "space.model.p", ["ring", "drop"]
    ),
    "when without otherwise": Bad(
        space("loss.weight: {uniform: [0.2, 0.8], when: {batch.repeats: [3]}}", REPEATS),
        5,
        "space.loss.weight",
        ["`when`", "`otherwise`", "both or neither"],
    ),
    "otherwise without when": Bad(
        space("model.p: {uniform: [1, 3], otherwise: 3.0}"), 5, "space.model.p", ["`otherwise`", "both or neither"]
    ),
    "otherwise that cannot be": Bad(
        space("model.p: {uniform: [1, 3], when: {batch.repeats: [3]}, otherwise: 0.5}", "batch.repeats: {int: [2, 3]}"),
        5,
        "space.model.p",
        ["[1, 100]", "0.5", "batch.repeats = 2"],
    ),
    # Ends of ranges. Space and parameter stand on one line.
    "copies and none, one loss": Bad(
        more("space: {batch.repeats: {choice: [1, 3]}}"),
        4,
        ANY,
        ["loss.weight must be 1", "got 0.5", "set loss.weight to 1", "batch.repeats = 1"],
    ),
    "batch of broken groups inside a range": Bad(
        more("space: {batch.size: {int: [504, 510]}}\nbase: {batch: {repeats: 4}}"),
        4,
        ANY,
        ["multiple of batch.repeats", "505 and 4", "batch.size = 505"],
    ),
    "weight above 1 at one end": Bad(
        space("loss.weight: {uniform: [0.5, 1.5]}"), 5, "space.loss.weight", ["equal to 1", "1.5"]
    ),
    "broken only where two ends meet": Bad(
        more("space: {batch.size: {choice: [6, 504]}, batch.repeats: {choice: [3, 4]}}"),
        4,
        ANY,
        ["6 and 4", "batch.size = 6, batch.repeats = 4"],
    ),
    "word that is no policy": Bad(
        space("augment.policy: {choice: [full, ful]}"), 5, "space.augment.policy", ["'ful'", "did you mean 'full'"]
    ),
    "fractions of a whole setting": Bad(
        space("batch.repeats: {uniform: [2, 3]}"), 5, "space.batch.repeats", ["integer", "2.0"]
    ),
    "one mistake at many ends": Bad(
        more("space: {batch.repeats: {choice: [1, 3]}, loss.weight: {uniform: [0.2, 0.8]}}"),
        4,
        ANY,
        ["loss.weight must be 1 where batch.repeats is 1", "batch.repeats = 1"],
    ),
    "workers that do not divide": Bad(
        more("resources: {workers: 5}"), 4, ANY, ["batch.size", "504 and 3 x 1 x 5", "batch.size to 510"]
    ),
    "later workers that do not divide": Bad(
        more("resources: {workers: 4, retrain_workers: 10}"), 4, ANY, ["504 and 3 x 1 x 10", "batch.size to 510"]
    ),
    "no workers": Bad(more("resources: {workers: 0}"), 4, "resources.workers", ["1 worker at least", "got 0", "raise"]),
    "none of the fewest": Bad(more("resources: {workers: [0, 2]}"), 4, "resources.workers", ["got [0, 2]", "raise"]),
    "fewest and most swapped": Bad(
        more("resources: {retrain_workers: [3, 1]}"),
        4,
        "resources.retrain_workers",
        ["min <= max", "got [3, 1]", "swap"],
    ),
    "workers in words": Bad(
        more("resources: {workers: all}"), 4, "resources.workers", ["whole number", "'all'", "for 1"]
    ),
    "workers in three": Bad(
        more("resources: {workers: [1, 2, 3]}"), 4, "resources.workers", ["[min, max]", "[1, 2, 3]"]
    ),
    "half a worker": Bad(more("resources: {workers: [1, 1.5]}"), 4, "resources.workers", ["whole number", "[1, 1.5]"]),
    "workers of which some do not divide": Bad(
        more("resources: {workers: [3, 5]}"),
        4,
        "resources.workers",
        ["504 and 3 x 1 x 60", "batch.size to 540 (for any of 3 to 5 workers)"],
    ),
    "weights by a wrong word": Bad(
        more("base:\n  model:\n    weights: imagenet"),
        6,
        "base.model.weights",
        ["must be random, zoo or a file that can be read", "/imagenet cannot (", "No such file"],
    ),
    "weights that are searched": Bad(
        space("model.weights: {choice: [random, nowhere.pt]}"),
        5,
        "space.model.weights",
        ["must be random, zoo or a file", "/nowhere.pt cannot", "at model.weights = "],
    ),
    "a trunk that gives no map": Bad(
        more("base:\n  model:\n    trunk: timm/vit_tiny_patch16_224"),
        6,
        "base.model.trunk",
        ["must be a network that gives a map", "name a convolutional one"],
    ),
    "no weights are published": Bad(
        more("resources: {workers: 2, retrain_workers: [1, 3]}\nbase: {model: {trunk: narrow, weights: zoo}}"),
        5,
        "base.model.weights",
        ["can be zoo where weights are published, but narrow has none"],
    ),
    "placement": Bad(more("resources: {placement: spred}"), 4, "resources.placement", ["'spred'", "mean 'spread'"]),
    # The objective and the search
    "misspelt metric": Bad(
        head(objective="{tpo1: max}"), 3, "objective.tpo1", ["metric", "did you mean 'top1'", "known: top1"]
    ),
    "no such metric": Bad(head(objective="{loss: min}"), 3, "objective.loss", ["metric", "known: top1"]),
    "wrong way": Bad(head(objective="{top1: min}"), 3, "objective.top1", ["larger", "set max"]),
    "no way": Bad(head(objective="{top1: maxi}"), 3, "objective.top1", ["'max' or 'min'", "'maxi'", "mean 'max'"]),
    "no metric": Bad(head(objective="{}"), 3, "objective", ["at least 1", "{}"]),
    "constraint on no metric": Bad(
        more("constraints: {tpo1: {min: 0.5}}"), 4, "constraints.tpo1", ["a metric", "did you mean 'top1'"]
    ),
    "constraint without a bound": Bad(
        more("constraints: {top1: {}}"), 4, "constraints.top1", ["`min`, `max` or both", "got neither", "set one"]
    ),
    "constraint that nothing meets": Bad(
        more("constraints: {top1: {min: 0.5, max: 0.25}}"), 4, "constraints.top1", ["got 0.5 and 0.25", "swap"]
    ),
    "weight of no objective": Bad(
        more("winner: {weights: {copy_map: 1}}"), 4, "winner.weights.copy_map", ["an objective", "known: top1"]
    ),
    "no weight": Bad(
        more("winner: {weights: {top1: 0}}"), 4, "winner.weights", ["weigh more than 0", "got none", "raise one"]
    ),
    "no budget": Bad(more("budget: {gpu_hours: 0}"), 4, "budget.gpu_hours", ["greater than 0", "got 0"]),
    "stratum that is not searched": Bad(
        more("search: {stratify: batch.repeats}\nspace: {model.p: {choice: [1.0, 3.0]}}"),
        4,
        "search.stratify",
        ["searched parameter", "got batch.repeats", "known: model.p"],
    ),
    "stratum of fractions": Bad(
        more("search: {stratify: model.p}\nspace: {model.p: {uniform: [1.0, 3.0]}}"),
        4,
        "search.stratify",
        ["`choice` or `int`", "got model.p", "leave it out"],
    ),
    "losers without rungs": Bad(
        more("search: {losers: pause, scheduler: none}\nspace: {model.p: {uniform: [1.0, 3.0]}}"),
        4,
        "search.losers",
        ["only asha", "set search.scheduler to asha"],
    ),
    "first setting of no parameter": Bad(
        more("space: {model.p: {uniform: [1.0, 3.0]}}\nsearch: {first: [{model.q: 2.0}]}"),
        5,
        "search.first.0.model.q",
        ["searched parameter", "did you mean 'model.p'"],
    ),
    "first setting that cannot be": Bad(
        more("space: {model.p: {uniform: [1.0, 3.0]}}\nsearch: {first: [{model.p: 0.5}]}"),
        4,
        "space.model.p",
        ["must lie in [1, 100]", "got 0.5", "at model.p = 0.5"],
    ),
    "first settings of a grid": Bad(
        more("space: {model.p: {choice: [1.0, 3.0]}}\nsearch: {sampler: grid, trials: 2, first: [{model.p: 1.0}]}"),
        5,
        "search.first",
        ["every setting anyway", "leave it out"],
    ),
    "more first settings than trials": Bad(
        more("space: {model.p: {choice: [1.0, 3.0]}}\nsearch: {trials: 1, first: [{model.p: 1.0}]}"),
        5,
        "search.trials",
        ["more than the 1 first", "got 1", "raise it"],
    ),
    "warm start from nothing": Bad(
        more("search: {warm_start: nowhere/run-1}"), 4, "search.warm_start", ["there is no", "study.db", "demo/run-1"]
    ),
    "password in the study's address": Bad(
        more("tracking: {study: 'postgresql://me:secret@host/name'}"),
        4,
        "tracking.study",
        ["must not hold a password", "PGPASSWORD"],
    ),
    "storage in a bucket of another kind": Bad(
        more("storage: gs://bucket/runs"), 4, "storage", ["s3://bucket/prefix", "begins with gs://"]
    ),
    "storage in no bucket": Bad(more("storage: s3://me:secret@host/x"), 4, "storage", ["must be s3://bucket/prefix"]),
    "password in the tracking server's address": Bad(
        more("tracking: {uri: 'https://me:secret@host'}"),
        4,
        "tracking.uri",
        ["must not hold a user or a password", "MLFLOW_TRACKING_USERNAME"],
    ),
    "study in a strange database": Bad(
        more("tracking: {study: 'mysql://host/name'}"), 4, "tracking.study", ["postgresql://", "got mysql"]
    ),
    "grace beyond the end": Bad(
        more("search: {grace_epochs: 4}\nbase: {epochs: 3}"), 4, "search.grace_epochs", ["base.epochs", "4 of 3"]
    ),
    "grid of fractions": Bad(
        more("search: {sampler: grid}\nspace: {loss.weight: {uniform: [0.2, 0.8]}}"),
        5,
        "space.loss.weight",
        ["needs `choice` or `int`", "[0.2, 0.8]", "list the values"],
    ),
    "grid of fractions by logarithm": Bad(
        more("search: {sampler: grid}\nspace: {augment.crop: {loguniform: [0.1, 0.8]}, model.p: {choice: [1.0, 3.0]}}"),
        5,
        "space.augment.crop",
        ["needs `choice` or `int`", "[0.1, 0.8]", "list the values"],
    ),
    "grid with more trials than settings": Bad(
        more("search: {sampler: grid, trials: 5}\nspace: {model.p: {choice: [1.0, 3.0]}, seed: {int: [0, 1]}}"),
        4,
        "search.trials",
        ["number of the grid's settings", "got 5 for 4", "set it to 4"],
    ),
    "grid with fewer trials than settings": Bad(
        more("search: {sampler: grid, trials: 3}\nspace: {model.p: {choice: [1.0, 3.0]}, seed: {int: [0, 1]}}"),
        4,
        "search.trials",
        ["number of the grid's settings", "got 3 for 4", "set it to 4"],
    ),
    "grid without the published setting": Bad(
        more("search: {sampler: grid, trials: 2}\nspace: {model.p: {choice: [1.0, 2.0]}}"),
        4,
        "search.trials",
        ["the published one included", "got 2 for 3", "set it to 3"],
    ),
    "grid with the trials left out": Bad(
        more("search: {sampler: grid}\nspace: {model.p: {choice: [1.0, 3.0]}}"), 4, "search.trials", ["got 20 for 2"]
    ),
    "grid of too many settings": Bad(
        more("search: {sampler: grid}\nspace: {seed: {int: [0, 10_000]}}"),
        4,
        "search.sampler",
        ["at most 10000", "more"],
    ),
    # The data
    "two sources": Bad(head(data="{builtin: digits, folder: x}"), 2, "data", ["exactly one", "name a folder"]),
    "no source": Bad(head(data="{}"), 2, "data", ["exactly one", "name a folder"]),
    "misspelt source": Bad(head(data="{builtin: digit}"), 2, "data.builtin", ["'digit'", "did you mean 'digits'"]),
    "missing folder": Bad(head(data="{folder: nowhere}"), 2, "data", ["must exist", "here/nowhere"]),
    "file for a folder": Bad(head(data="{folder: grainmill-runs/small/run-1/done.json}"), 2, "data", ["must exist"]),
    "endless folder": Bad(head(data="{folder: " + "f" * 5000 + "}"), 2, "data", ["must exist"]),
    # The trainable
    "misspelt trainable": Bad(more("trainable: multigrian"), 4, "trainable", ["'multigrian'", "installed: multigrain"]),
    "empty trainable": Bad(more("trainable: ''"), 4, "trainable", ["''", "installed: multigrain"]),
    "no module": Bad(more("trainable: nowhere.at.all"), 4, "trainable", ["'nowhere.at.all'", "installed: multigrain"]),
    "module that is none": Bad(more("trainable: os.path"), 4, "trainable", ["os.path"]),
    "relative module": Bad(more("trainable: .fit"), 4, "trainable", ["'.fit'"]),
    # Overrides, which stand on no line
    "override without a value": Bad(HEAD, None, ANY, ["--set", "key=value", "'epochs'"], ("--set", "epochs")),
    "override that is no YAML": Bad(HEAD, None, ANY, ["--set base.seed", "valid YAML"], ("--set", "base.seed=]")),
    "override in a value": Bad(HEAD, None, ANY, ["--set name.x", "name is a value"], ("--set", "name.x=3")),
    "override of a wrong type": Bad(
        more("base:\n  epochs: 3"), None, "base.epochs", ["'many'", "120"], ("--set", "base.epochs=many")
    ),
    "override of no setting": Bad(
        more("base:\n  seed: 3"), None, "base.epcohs", ["'epochs'"], ("--set", "base.epcohs=3")
    ),
    "override with bad ends": Bad(
        space("loss.weight: {choice: [0.5]}"),
        None,
        "space.loss.weight",
        ["equal to 1", "1.5"],
        ("--set", "space.loss.weight={choice: [0.5, 1.5]}"),
    ),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_file_is_told_with_place_rule_value_and_remedy_and_nothing_is_written(bad, validate):
    check_told(validate(bad.text, *bad.arguments), bad.line, bad.key, bad.says)


@pytest.mark.parametrize(("name", "says"), [("nowhere.yaml", "No such file"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read_is_told(name, says, here):
    check_told(validate_file(here.parent, here / name), None, "", ["readable", says])


def picture(colour):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


PICTURE = picture("red")
TWO_CLASSES = {f"{name}/{number}.png": picture((9, number, ord(name))) for name in "ab" for number in (1, 2)}
SPLIT = {"train/a/1.png": PICTURE, "train/b/1.png": picture("blue"), "val/a/1.png": picture("lime")}
COPIES = {"copies/original/000100.png": PICTURE, "copies/strong/000101.png": PICTURE}

BAD_FOLDERS = {
    "empty": ({}, ["images are expected in", "pictures/<class>/"]),
    "class without images": (
        {**TWO_CLASSES, "c/notes.txt": b"none"},
        ["must hold images (.", "pictures/c"],
    ),
    "val class without images": (SPLIT | {"val/b/": None}, ["must hold images", "pictures/val/b"]),
    "class of one image": ({**TWO_CLASSES, "c/1.png": PICTURE}, ["needs 2 images", "pictures/c"]),
    "set of one image": (
        {"train/a/1.png": PICTURE, "val/a/1.png": PICTURE},
        ["at least 2 images", "found 1 in "],
    ),
    "train without val": ({"train/a/1.png": PICTURE, "train/a/2.png": PICTURE}, ["needs val/<class>/", "pictures"]),
    "val class that train lacks": (SPLIT | {"val/c/1.png": PICTURE}, ["must be in train/", "pictures/train/c"]),
    "truncated image": (
        {**TWO_CLASSES, "b/2.png": PICTURE[: len(PICTURE) // 2]},
        ["usable", "pictures/b/2.png", "repair or remove"],
    ),
    "text for an image": ({**TWO_CLASSES, "a/1.png": b"text"}, ["usable", "pictures/a/1.png", "repair or remove"]),
    "broken image in val": (SPLIT | {"val/b/1.png": b""}, ["usable", "pictures/val/b/1.png", "repair or remove"]),
    "broken copy": (
        TWO_CLASSES | COPIES | {"copies/strong/000102.png": b""},
        ["usable", "pictures/copies/strong/000102.png", "repair or remove"],
    ),
    "copies without originals": (
        {**TWO_CLASSES, "copies/strong/000101.png": PICTURE},
        ["needs images in", "pictures/copies/original"],
    ),
    "copy without its original": (
        TWO_CLASSES | COPIES | {"copies/strong/000201.png": PICTURE},
        ["name its original", "pictures/copies/strong/000201.png"],
    ),
}
COPY_MAP = HEAD.replace("builtin: shapes", "folder: pictures").replace("top1", "copy_map")


@pytest.fixture
def pictures(here):
    """Writes the folder `pictures`."""

    def write(files):
        folder = here / "pictures"
        folder.mkdir()
        for name, content in files.items():
            path = folder / name
            (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content)

    return write


@pytest.mark.parametrize(("files", "says"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_pictures_are_told_before_anything_starts(files, says, pictures, validate):
    pictures(files)
    check_told(validate(head(data="{folder: pictures}")), 2, "data", says)


def test_a_bucket_is_checked_as_a_folder_is(bucket, validate, tmp_path_factory):
    bucket.put(**{f"set/{name}": content for name, content in SPLIT.items()})
    bucket.put(**{f"bad/a/{number}.png": b"" for number in range(3)})
    cache = tmp_path_factory.mktemp("cache")
    told = {
        f"{bucket.name}-not/set": ["none of that name"],
        f"{bucket.name}/absent": ["there are none; check bucket and prefix"],
        f"me:{SECRET}@{bucket.name}": ["must be s3://bucket/prefix"],
    }
    for source, says in told.items():
        check_told(validate(head(data=f"{{folder: 's3://{source}', cache: {cache}}}")), 2, "data", says)
    listed = f"s3://{bucket.name}/set/list.csv"
    says = [f"the manifest must exist, but there is no file {listed}"]
    check_told(validate(head(data=f"{{manifest: {listed}, cache: {cache}}}")), 2, "data", says)
    code, _, stderr = validate(head(data=f"{{folder: s3://{bucket.name}/bad, cache: {cache}}}"))
    assert (code, stderr.count(f"line 2: data: every image must be usable, but s3://{bucket.name}/bad/a/")) == (2, 3)
    assert validate(head(data=f"{{folder: s3://{bucket.name}/set, cache: {cache}}}"))[0] == 0
    check_told(validate(head(data="{folder: x, cache_limit: 0}")), 2, "data.cache_limit", ["greater than 0"])


def test_class_folders_may_have_any_name_that_the_disk_allows(pictures, validate):
    pictures({**TWO_CLASSES, os.fsdecode(b"\xff/1.png"): PICTURE, os.fsdecode(b"\xff/2.png"): PICTURE})
    assert validate(head(data="{folder: pictures}"))[0] == 0


def test_every_problem_of_the_pictures_is_told_in_the_order_of_their_names(pictures, validate):
    broken = [f"{part}/a/{number:02}.png" for part in ("train", "val") for number in range(10)]
    pictures(SPLIT | dict.fromkeys(broken, b"text"))
    code, _, stderr = validate(head(data="{folder: pictures}"))
    title, *problems = stderr.splitlines()
    assert code == 2
    assert title.endswith(": 20 problems")
    assert [problem.split("pictures/")[1].split()[0] for problem in problems] == broken


def test_copies_can_be_the_objective_only_where_the_folder_has_some(pictures, validate):
    pictures(TWO_CLASSES)
    check_told(validate(COPY_MAP), 3, "objective.copy_map", ["these data allow", "known: top1"])
    for name, content in COPIES.items():
        path = Path("pictures", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert validate(COPY_MAP)[0] == 0


def test_every_picture_is_opened_and_progress_is_tracked(pictures, tmp_path):
    pictures(TWO_CLASSES | COPIES)
    file = tmp_path / "file.yaml"
    file.write_text(COPY_MAP)
    tracked = []

    def progress(items, title, length):
        seen = list(items)
        tracked.append((title, len(seen), length))
        return seen

    load(file, progress=progress)
    assert tracked == [("checking images", 6, 6)]


def places(stderr):
    """(line, key) of each problem, as told."""
    title, *problems = stderr.splitlines()
    parts = [problem.strip().split(": ") for problem in problems]
    found = [
        (part[0].removeprefix("line "), part[1]) if part[0].startswith("line ") else ("", part[0]) for part in parts
    ]
    assert title.endswith(f": {len(found)} problems")
    return found


def test_all_problems_are_told_at_once_by_line(validate):
    code, _, stderr = validate(
        "serach: {}\n"
        "objective: {top1: mx}\n"
        "space:\n"
        "  model.p: {uniform: [3, 1]}\n"
        "  loss.weight: {uniform: [low, 0.5]}\n"
        "base:\n"
        "  loss: {wieght: 1, margin: 0}\n"
        "  epochs: 0\n"
        "data: {builtin: digit}\n"
        "name: ../x\n"
    )
    assert code == 2
    assert places(stderr) == [
        ("1", "serach"),
        ("2", "objective.top1"),
        ("4", "space.model.p"),
        ("5", "space.loss.weight.uniform.0"),
        ("7", "base.loss.margin"),
        ("7", "base.loss.wieght"),
        ("8", "base.epochs"),
        ("9", "data.builtin"),
        ("10", "name"),
    ]


def test_what_is_wrong_between_sections_is_told_at_once_too(validate):
    code, _, stderr = validate(
        "search: {losers: pause, scheduler: none, grace_epochs: 3}\n"
        "space:\n"
        "  loss.wight: {uniform: [0.2, 0.8]}\n"
        "  model.p: {uniform: [1, 3], when: {augment.flip: [1.0], loss.mragin: [1.0]}, otherwise: 3.0}\n"
        "  augment.flip: {uniform: [0, 0.5]}\n"
        "base: {epochs: 2}\n"
        "objective: {top1: max, class_map: max}\n"
        "data: {folder: nowhere}\n"
        "name: small\n"
        "resources: {workers: none}\n"
    )
    assert code == 2
    assert sorted(places(stderr)) == sorted(
        [
            ("1", "search.grace_epochs"),
            ("3", "space.loss.wight"),
            ("4", "space.model.p"),  # a value that augment.flip cannot have
            ("4", "space.model.p"),  # a parameter that is not searched
            ("8", "data"),
            ("10", "resources.workers"),
        ]
    )


def test_a_key_that_stands_twice_and_a_bad_override_do_not_hide_the_rest(validate):
    code, _, stderr = validate(
        "name: small\nname: other\ndata: {builtin: shapes}\nobjective: {tpo1: max}\nbase: {epochs: 0}\n",
        "--set",
        "search.trials=0",
        "--set",
        "search",
    )
    assert code == 2
    assert [part for part in ["--set", "search.trials", "line 2", "line 4", "line 5"] if part not in stderr] == []


def test_all_required_keys_that_are_missing_are_told(validate):
    code, _, stderr = validate("base: {}\n")
    assert code == 2
    assert places(stderr) == [("", "data"), ("", "name"), ("", "objective")]


def test_conditions_in_a_ring_are_told_on_each_of_its_lines(validate):
    text = space(MARGIN % "[3]", "batch.repeats: {choice: [2, 3], when: {loss.weight: [0.5]}, otherwise: 2}")
    code, _, stderr = validate(text)
    assert code == 2
    assert places(stderr) == [("5", "space.loss.weight"), ("6", "space.batch.repeats")]
    assert stderr.count("must not form a ring; drop") == 2


def test_a_right_file_is_told_to_be_right_and_nothing_is_written(validate):
    code, stdout, stderr = validate(DEMO.read_text())
    assert (code, stderr) == (0, "")
    assert "is right" in stdout
    assert "10 trials of up to 9 epochs" in stdout
    assert "loss.weight=0.5" in stdout
    assert "batch.repeats=3" in stdout


@pytest.mark.parametrize(
    ("parameters", "trials"),
    [
        (["model.p: {choice: [1.0, 3.0]}", "seed: {int: [0, 2]}"], 6),
        (["model.p: {choice: [1.0, 2.0]}", "seed: {int: [0, 2]}"], 7),  # the published 3 comes first
        (["batch.repeats: {choice: [1, 3]}", "loss.weight: {choice: [0.5, 0.7], when: %s, otherwise: 1.0}"], 3),
        (["seed: {int: [0, 9999]}"], 10_000),
        ([], 1),
    ],
)
def test_a_grid_has_as_many_trials_as_settings(parameters, trials, validate):
    text = space(*(line.replace("%s", "{batch.repeats: [3]}") for line in parameters)) if parameters else HEAD
    assert validate(f"{text}search: {{sampler: grid, trials: {trials}}}\n")[0] == 0


def test_a_condition_puts_right_what_the_ends_alone_would_make_invalid(validate):
    assert validate(space(MARGIN % "[3]", REPEATS))[0] == 0


@pytest.fixture
def read(tmp_path):
    """An `Experiment` of a text and overrides."""

    def read(text, *overrides):
        file = tmp_path / "file.yaml"
        file.write_text(text)
        return load(file, overrides)

    return read


def test_what_is_left_out_has_its_published_default(read):
    experiment = read(HEAD)
    assert experiment.trainable == "multigrain"
    assert (experiment.base.epochs, experiment.base.batch.size, experiment.base.loss.weight) == (120, 504, 0.5)
    assert (experiment.search.sampler, experiment.search.scheduler, experiment.search.trials) == ("tpe", "asha", 20)
    assert (experiment.resources.workers, experiment.resources.retrain_workers) == (1, 1)
    assert experiment.space == {}
    assert experiment.reference == {}
    assert experiment.storage == "grainmill-runs"


def test_the_first_trial_has_the_published_setting_of_what_is_searched(read):
    # 0.5 and 3 are the paper's, whatever the base says and wherever the range lies.
    experiment = read(
        space("loss.weight: {uniform: [0.6, 0.8]}", "model.p: {uniform: [1, 2]}")
        + "base: {loss: {weight: 0.7}, model: {p: 1.0}}\n"
    )
    assert experiment.reference == {"loss.weight": 0.5, "model.p": 3.0}


def test_the_first_trial_follows_the_conditions(read):
    # The published number of copies is 3, at which this weight is not searched.
    experiment = read(space(MARGIN % "[2]", "batch.repeats: {choice: [2, 3]}", "model.p: {uniform: [1, 2]}"))
    assert experiment.reference == {"batch.repeats": 3, "loss.weight": 1.0, "model.p": 3.0}


def test_a_trial_has_the_base_settings_with_its_own_put_in():
    experiment = load(DEMO)
    found = experiment.spec({"batch.repeats": 1, "loss.weight": 1.0, "augment.policy": "copy"})
    assert (found.batch.repeats, found.loss.weight, found.augment.policy) == (1, 1.0, "copy")
    assert (found.image_size, found.epochs, found.model.trunk, found.batch.size) == (32, 9, "narrow", 96)
    assert (found.loss.margin, found.optimizer.momentum) == (0.2, 0.9)
    assert experiment.base.batch.repeats == 3
    with pytest.raises(ValidationError, match=r"loss\.weight must be 1"):
        experiment.spec({"batch.repeats": 1, "loss.weight": 0.5})


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["base.epochs=7"], more("base: {epochs: 7}")),
        (["base.loss.weight=1e-1", "base.seed=2"], more("base: {loss: {weight: 0.1}, seed: 2}")),
        (["space.loss.weight={uniform: [0.2, 0.8]}"], space("loss.weight: {uniform: [0.2, 0.8]}")),
        (["data={builtin: digits}"], head(data="{builtin: digits}")),
        (["objective={copy_map: max}"], head(objective="{copy_map: max}")),
        (["storage=/elsewhere", "tracking.uri=http://x"], more("storage: /elsewhere\ntracking: {uri: http://x}")),
    ],
)
def test_an_override_is_as_if_the_file_said_so(read, overrides, text):
    assert read(HEAD, *overrides).model_dump() == read(text).model_dump()


@pytest.mark.parametrize(
    "key", ["tracking.uri", "tracking.study", "storage", "data.folder", "base.model.weights", "search.warm_start"]
)
def test_a_secret_in_any_address_is_told_at_its_key_and_not_shown(key, read):
    with pytest.raises(ExperimentError) as caught:
        read(HEAD, f"{key}=https://h/x?token=s3cret")
    assert f"{key}: must not hold parameters that may be secret, got token; " in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("key", ["storage", "data.folder", "search.warm_start", "base.model.weights"])
def test_an_address_of_a_kind_that_is_not_read_is_told_at_its_key(key, read):
    with pytest.raises(ExperimentError, match=rf"{key}: an address in S3 must .* write s3://bucket/x"):
        read(HEAD, f"{key}=s3:/bucket/x")
    with pytest.raises(ExperimentError, match=rf"{key}: must be a path or s3://bucket/prefix, got .* gs://"):
        read(HEAD, f"{key}=gs://bucket/x")


def test_paths_are_complete_from_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "x" / "file.yaml"
    file.parent.mkdir()
    file.write_text(head(data="{folder: images}"))
    near = load(file, here=False)
    home = load(file, ["data={manifest: ~/a.csv}", "base.model.weights=~/w.pt"], here=False)
    far = load(file, ["data.folder=s3://bucket/x"], here=False)
    assert near.data.folder == str(tmp_path / "images")
    assert (home.data.manifest, home.base.model.weights) == (f"{tmp_path}/home/a.csv", f"{tmp_path}/home/w.pt")
    assert far.data.folder == "s3://bucket/x"


TYPED = ["images #2", "2024", "010", "no", "a: b", "@home", "[new] set", "{x", "1e3", "2024-01-15", " x ", "*a", "'"]
TYPED += ["it's", "~", "#", "a\nb", "true", "!x", "'a' and 'b'"]


@pytest.mark.parametrize("text", TYPED)
@pytest.mark.parametrize(
    ("key", "reached"),
    [
        ("data.cache", lambda read: read.data.cache.removeprefix(f"{Path.cwd()}/")),  # of the trainable
        ("tracking.uri", lambda read: read.tracking.uri),
        ("search.stratify", lambda read: read.search.stratify),
    ],
)
def test_a_setting_that_is_text_is_taken_as_typed(key, reached, text, tmp_path, monkeypatch):
    monkeypatch.setattr("grainmill.config.validation.between_sections", lambda *_: ())
    file = tmp_path / "file.yaml"
    file.write_text(HEAD)
    assert reached(load(file, [f"{key}={text}"], here=False)) == text


def test_quotes_around_the_whole_and_null_are_yaml_where_text_is_meant(read, monkeypatch):
    monkeypatch.setattr("grainmill.config.validation.between_sections", lambda *_: ())
    overrides = ["storage='it''s'", 'tracking.study="null"', "tracking.uri=null", "name='2024'", "search.stratify="]
    found = read(HEAD, *overrides)
    assert (found.storage, found.tracking.study, found.tracking.uri, found.name) == ("it's", "null", None, "2024")
    assert found.search.stratify == ""


def test_text_inside_lists_and_sections_is_taken_as_typed_too():
    class Inner(Section):
        paths: Annotated[tuple[str, ...], Field(strict=False)] = ()
        places: dict[str, str] = Field({})
        sizes: Annotated[tuple[int, ...], Field(strict=False)] = ()
        p: float | str = 3.0

    class Outer(Section):
        inner: Inner | None = None

    overrides = ["inner={paths: [2024, no, 010], places: {no: 1:30}, sizes: [7, 8], p: 2}"]
    assert checked_settings(Outer, overrides).inner == Inner(
        paths=("2024", "no", "010"), places={"no": "1:30"}, sizes=(7, 8), p=2.0
    )
    # A union of text and a number is read as YAML.
    assert [checked_settings(Inner, [f"p={text}"]).p for text in ("2", "published")] == [2.0, "published"]


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("storage=/elsewhere", True),
        ("tracking.uri=http://elsewhere", True),
        ("tracking.model=other", True),
        ("base.epochs=120", True),  # the default, written out
        ("base.epochs=121", False),
        ("name=other", False),
        ("data={builtin: digits}", False),
        ("objective={class_map: max}", False),
        ("search.trials=21", False),
        ("resources.workers=2", False),
        ("space.model.p={uniform: [1, 3]}", False),
    ],
)
def test_the_identity_is_everything_but_where_things_are_kept(read, override, same):
    assert (read(HEAD, override).identity() == read(HEAD).identity()) is same


def test_the_identity_written_as_a_file_is_the_same_experiment(read):
    before = load(DEMO, ["space.seed={int: [0, 9]}", "resources.retrain_workers=[1, 2]", "resources.placement=spread"])
    assert before.resources.retrain_workers == (1, 2)
    after = read(to_yaml(before.identity()))
    assert after.model_dump() == before.model_dump()
    assert list(after.space) == list(before.space)


def test_an_experiment_cannot_be_changed(read):
    experiment = read(more("space: {model.p: {uniform: [1, 3]}}"))
    for changed, name in [
        (experiment, "name"),
        (experiment.base, "epochs"),
        (experiment.search, "trials"),
        (experiment.space["model.p"], "uniform"),
    ]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(changed, name, None)


def test_every_key_of_the_schema_is_described_and_no_other_is_allowed():
    schema = json_schema(trainable.find("multigrain"))
    assert sorted(schema["required"]) == ["data", "name", "objective"]
    models = [schema, *schema["$defs"].values()]
    assert {model["additionalProperties"] for model in models} == {False}
    fields = {name: field for model in models for name, field in model["properties"].items()}
    # A section is described where it is defined.
    assert [name for name, field in fields.items() if not {"description", "$ref"} & set(field)] == []
    assert [model["title"] for model in models if not model.get("description")] == []
    assert "int" in schema["$defs"]["Parameter"]["properties"]


def test_the_error_holds_the_problems_as_data(read):
    with pytest.raises(ExperimentError) as caught:
        read(more("base: {epochs: 0}"))
    (problem,) = caught.value.problems
    assert (problem.line, problem.key) == (4, "base.epochs")


@pytest.mark.parametrize(
    ("promotion", "key", "says"),
    [
        ("{metric: copyday/strong/map}", "promotion.metric", ["begin with a benchmark", "did you mean 'copydays'?"]),
        ("{metric: top1}", "promotion.metric", ["begin with a benchmark", "known: imagenet, holidays"]),
        ("{metric: copydays/strong/mpa}", "promotion.metric", ["measure of copydays", "did you mean 'map'?"]),
        ("{metric: copydays}", "promotion.metric", ["measure of copydays", "known: map, map_finite"]),
        ("{metric: disc21/micro_ap}", "promotion.metric", ["value for each query", "known: recall-at-1"]),
        ("{minimum: {holiday/map: 0.5}}", "promotion.minimum.holiday/map", ["did you mean 'holidays'?"]),
    ],
)
def test_metrics_of_promotion_must_be_measured_query_by_query(promotion, key, says, validate):
    check_told(validate(head() + f"promotion: {promotion}\n"), 4, key, says)


@pytest.mark.parametrize("metric", ["copydays/strong/map", "roxford5k/hard/mp-at-10", "imagenet/top1", "ukbench/ukb"])
def test_metrics_of_promotion_that_are_measured_are_taken(metric, validate):
    assert validate(head() + f"promotion: {{metric: {metric}, minimum: {{{metric}: 0.1}}}}\n")[0] == 0

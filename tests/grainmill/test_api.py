"""The public functions: their names and signatures, what importing them loads, and what they accept."""

import inspect
import subprocess
import sys

import pytest
import yaml

import grainmill as gm
from grainmill import errors, progress
from grainmill.registry.models import Version
from grainmill.search.records import TrialRecord
from grainmill.search.selection import Candidate, Estimate
from grainmill.workflows.tune import Outcome

SIGNATURES = {
    "load": "file, overrides=(), *, quiet=False",
    "tune": "experiment, *, tracking_uri=None, address=None, quiet=False",
    "train": "experiment, *, tracking_uri=None, address=None, quiet=False",
    "evaluate": "model, on, settings=(), *, out='evaluation', trainable='multigrain', workers=1, tracking_uri=None, "
    "address=None",
    "embed": "model, images, out, *, workers=1, tracking_uri=None, address=None, quiet=False",
    "find": "model, index, queries, *, count=10, page='found.html', tracking_uri=None",
    "duplicates": "index, *, precision=0.9, threshold=None, out=None",
    "promote": "model, gates=(), *, tracking_uri=None, quiet=False",
    "rollback": "name, *, tracking_uri=None, quiet=False",
}


def plain(function):
    """A signature without its types."""
    signature = inspect.signature(function)
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(inspect.Signature(parameters))[1:-1]


def test_public_names_and_signatures_stay_as_they_are():
    raised = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(gm.__all__) == SIGNATURES.keys() | raised
    assert {name: plain(getattr(gm, name)) for name in SIGNATURES} == SIGNATURES
    assert all(inspect.getdoc(getattr(gm, name)) for name in SIGNATURES)


def test_importing_grainmill_loads_no_other_package():
    code = "import sys; before = set(sys.modules); import grainmill; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in eval(done.stdout)}
    assert loaded - set(sys.stdlib_module_names) == {"grainmill"}


@pytest.fixture
def file(tmp_path):
    content = {"name": "mine", "trainable": "toy", "data": {}, "objective": {"score": "max"}}
    content |= {"space": {"height": {"uniform": [0.0, 1.0]}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "mine.yaml"


def test_overrides_are_plain_values_by_dotted_path_or_texts_as_of_the_command(file, tmp_path):
    values = {"base.epochs": 3, "space.height": {"int": [0, 2]}, "storage": tmp_path / "runs", "search.first": []}
    texts = ["base.epochs=3", "space.height={int: [0, 2]}", f"storage={tmp_path / 'runs'}", "search.first=[]"]
    by_value, by_text = gm.load(file, values, quiet=True), gm.load(str(file), texts, quiet=True)
    assert by_value.identity() == by_text.identity()
    assert (by_value.base.epochs, by_value.storage) == (3, str(tmp_path / "runs"))
    with pytest.raises(gm.ExperimentError, match=r"base\.epoch: unknown key; did you mean 'epochs'"):
        gm.load(file, {"base.epoch": 3})


def test_name_that_is_taken_is_refused_before_anything_starts(file, tmp_path):
    home = tmp_path / "runs" / "mine"
    home.mkdir(parents=True)
    (home / "experiment.yaml").write_text("name: mine\n")
    with pytest.raises(gm.NameTakenError, match="choose another name"):
        gm.tune(gm.load(file, {"storage": tmp_path / "runs"}))


def record(number, **changes):
    values = {"state": "complete", "setting": {"height": 0.5}, "history": ({"epoch": 4, "score": 0.5},), "times": (1,)}
    return TrialRecord(**{"number": number, "cause": None, "variants": {}, "cost": {}, **values, **changes})


def test_the_outcome_of_a_run_shows_its_version_its_values_and_its_report(file):
    estimates = {"score": Estimate(0.5, 0.01), "loss": Estimate(1.0, float("inf"))}
    winner, version = Candidate(record(3), [record(0), record(1)], estimates), Version("mine", "2")
    experiment, trials = gm.load(file, quiet=True), [record(3), record(4)]
    outcome = Outcome(experiment, trials, [winner], winner, record(0), version, False, "runs/report.html", "sqlite://")
    assert repr(outcome) == "Outcome(models:/mine/2, challenger; score 0.5000 ± 0.0100; 2 trials; runs/report.html)"
    assert repr(winner) == "Candidate(trial 3, 2 trainings)"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_is_shown_line_by_line_where_nothing_can_be_changed_on_the_screen(file, capsys, quiet):
    with progress.RunDisplay(gm.load(file, quiet=True), quiet) as display:
        display.message("searching")
        display.trial("trial-0003", record(3))
    assert capsys.readouterr().out.splitlines() == (
        [] if quiet else ["searching", "trial-0003  complete  4/4  0.5000  height=0.5"]
    )
    assert list(progress.bar(quiet)([1, 2], "images", 2)) == [1, 2]


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ("s3:/bucket/x", "the place of the images: an address"),
        ("gs://bucket/x", "must be a path or s3://bucket/prefix"),
        ("https://h/x.csv?token=s3cret", "got token; "),
    ],
)
def test_images_at_an_address_that_is_not_read_are_refused_before_anything_starts(images, says, tmp_path):
    with pytest.raises(errors.CorpusError) as caught:
        gm.embed("models:/m@champion", images, tmp_path / "index")
    assert says in str(caught.value)
    assert "s3cret" not in str(caught.value)

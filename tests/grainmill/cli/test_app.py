"""The command as its user runs it: what it prints, and its exit code."""

import json
import os

import pytest
import yaml
from commands import start
from PIL import Image
from typer.testing import CliRunner

from grainmill import environment
from grainmill.cli.app import app
from grainmill.cli.console import print_table, say
from grainmill.errors import TrackingError


def run(*words):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, words)])


def test_wrong_file_ends_with_code_2_before_anything_starts(gated_file, tmp_path):
    process = start(["tune", gated_file, "--set", "search.trails=4"], tmp_path, "none")
    output = process.communicate()[0]
    assert process.returncode == 2
    assert "search.trails: unknown key; did you mean 'trials'?" in output
    assert not (tmp_path / "runs").exists()


def test_name_used_with_other_settings_ends_with_code_2_and_tells_the_difference(gated_file, tmp_path):
    home = tmp_path / "runs" / "cut-short"
    home.mkdir(parents=True)
    (home / "experiment.yaml").write_text("name: cut-short\nsearch:\n  trials: 7\n")
    done = run("tune", gated_file)
    assert done.exit_code == 2
    assert "--set name=cut-short-2" in done.output
    assert "-  trials: 7" in done.output
    assert sorted(path.name for path in home.iterdir()) == ["experiment.yaml"]


def test_tracking_server_that_does_not_answer_ends_with_code_1_and_the_remedy(gated_file):
    done = run("tune", gated_file, "--set", "tracking.uri=http://127.0.0.1:9")
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), "no defect"
    assert "MLflow must answer at http://127.0.0.1:9" in done.output


def test_password_in_the_address_of_the_server_is_nowhere_to_be_seen(gated_file, tmp_path, monkeypatch):
    for name in ("URI", "USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")  # and put back in the end, whatever the commands set
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:very%2Dsecret@127.0.0.1:9")
    for words in (["tune", gated_file], ["promote", "models:/apples/1"], ["rollback", "apples"]):
        done = run(*words)
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit), "no defect"
        assert "MLflow must answer at http://127.0.0.1:9, but said" in done.output
        assert "secret" not in done.output
    in_file = run("tune", gated_file, "--set", "tracking.uri=http://me:very-secret@127.0.0.1:9")
    assert in_file.exit_code == 2
    assert "tracking.uri: must not hold a user or a password" in in_file.output
    assert "very-secret" not in in_file.output
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in kept)


def test_a_user_and_a_password_go_where_mlflow_reads_them(monkeypatch):
    variables = {"MLFLOW_TRACKING_URI": "https://me:p%40ss@host:5000/path"}
    monkeypatch.setattr(os, "environ", variables)
    assert environment.tracking_uri() == "https://host:5000/path"
    assert (variables["MLFLOW_TRACKING_USERNAME"], variables["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")
    assert variables["MLFLOW_TRACKING_URI"] == "https://host:5000/path"  # all that child processes see
    assert environment.tracking_uri() == "https://host:5000/path"  # a second call finds the server, too
    assert environment.tracking_uri("http://other", "runs") == "http://other"
    del variables["MLFLOW_TRACKING_URI"]
    assert environment.tracking_uri(storage="/runs") == "sqlite:////runs/mlflow.db"


def test_storage_in_s3_needs_a_tracking_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match=r"none is named; set tracking\.uri or MLFLOW_TRACKING_URI"):
        environment.tracking_uri(storage="s3://bucket/runs")
    assert environment.tracking_uri("http://host", "s3://bucket/runs") == "http://host"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    assert environment.tracking_uri(storage="s3://bucket/runs") == "http://other"


def test_images_that_will_be_left_out_are_told_when_a_file_is_checked(tmp_path):
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    (tmp_path / "images/a/4.png").write_bytes(b"")
    data = {"folder": "images", "skip_broken": True}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "data": data, "objective": {"top1": "max"}}))
    process = start(["validate", "mine.yaml"], tmp_path, "none")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "left out  1: a/4.png\n" in output
    assert "warning: 1 file is left out, because each is empty: a/4.png\n" in output
    assert "mine.yaml is right." in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "mine.yaml"]


def test_validate_gives_programs_what_was_found_and_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    (tmp_path / "mine.yaml").write_text("name: mine\ndata: {folder: images}\nobjective: {top1: max}\n")
    done = CliRunner().invoke(app, ["validate", "mine.yaml", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["valid"] is True
    assert told["data"]["formats"] == {"PNG": 8}
    assert told["data"]["train"] + told["data"]["val"] == 8
    assert ["batch.size is 504, but" in text for text in told["warnings"]] == [True]
    done = CliRunner().invoke(app, ["validate", "mine.yaml", "--json", "--set", "base.epoch=3"])
    assert done.exit_code == 2
    (problem,) = json.loads(done.stdout)["problems"]
    assert (problem["line"], problem["key"]) == (None, "base.epoch")


def test_what_is_printed_cannot_change_the_terminal(capsys):
    say("[/b].jpg [red]x[/red] \x1b[2J\x07 \udcff \u202e caf\u00e9")
    assert capsys.readouterr().out == "[/b].jpg [red]x[/red] \\x1b[2J\\x07 \\udcff \\u202e caf\u00e9\n"
    print_table(("[b]", "n"), [("[/b].jpg", "\x1b[31m")], "[title]")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[b]", "[/b].jpg", "\\x1b[31m", "[title]"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tune"], "FILE or --resume NAME is required, got neither"),
        (["tune", "x.yaml", "--resume", "x"], "FILE must be left out, got both"),
        (["evaluate", "m", "--on", "copydays"], "got 'copydays'; add what is missing, such as --on copydays=/data/"),
        (["evaluate", "m", "--on", "copydays="], "got 'copydays='; add what is missing"),
        (["evaluate", "m", "--on", "=/data"], "got '=/data'; add what is missing"),
    ],
)
def test_words_that_are_missing_or_too_many_are_told(words, says):
    done = run(*words)
    assert done.exit_code == 2
    assert says in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(
    "words", [["promote", "models:/m@champion"], ["rollback", "m"], ["find", "models:/m@champion", "index", "q.jpg"]]
)
def test_looking_makes_no_database(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    done = run(*words)
    assert done.exit_code == 1
    assert not list(tmp_path.rglob("mlflow.db"))

"""What travels with a job, under which name, and to which clusters; and real jobs on a cluster that wants a token."""

import http.server
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import ray
import yaml
from commands import SUPPORT
from ray.job_submission import JobStatus

from grainmill import trainable
from grainmill.cluster import submission
from grainmill.config import experiment
from grainmill.errors import ExperimentError, SubmissionError
from grainmill.storage import provenance

DEMO = SUPPORT.parents[1] / "search_spaces" / "demo.yaml"
HEAD = "http://127.0.0.1:8265"


def client(**states):
    """Of a cluster with jobs by id; `_` stands for a hyphen."""
    jobs = [
        types.SimpleNamespace(submission_id=name.replace("_", "-"), status=JobStatus(state))
        for name, state in states.items()
    ]
    jobs.append(
        types.SimpleNamespace(submission_id=None, status=JobStatus.RUNNING)
    )  # of a driver that was not submitted
    return types.SimpleNamespace(list_jobs=lambda: jobs)


def test_id_is_the_next_of_its_name():
    assert submission.next_submission_id(client(), HEAD, "demo") == "grainmill-demo-1"
    others = client(grainmill_demo_2_7="RUNNING", grainmill_demos_3="RUNNING", other_demo_4="PENDING")
    assert submission.next_submission_id(others, HEAD, "demo") == "grainmill-demo-1"
    ended = client(grainmill_demo_9="FAILED", grainmill_demo_10="SUCCEEDED", grainmill_demo_2="STOPPED")
    assert submission.next_submission_id(ended, HEAD, "demo") == "grainmill-demo-11"
    assert submission.next_submission_id(client(grainmill_axb_1="RUNNING"), HEAD, "a.b") == "grainmill-a.b-1"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_name_whose_job_is_not_at_its_end_is_refused(state):
    jobs = client(grainmill_demo_1="FAILED", grainmill_demo_2=state)
    with pytest.raises(SubmissionError, match=f"but grainmill-demo-2 is {state.lower()}; wait") as caught:
        submission.next_submission_id(jobs, HEAD, "demo")
    assert f"ray job logs --follow --address {HEAD} grainmill-demo-2" in str(caught.value)
    assert f"ray job stop --address {HEAD} grainmill-demo-2" in str(caught.value)


@pytest.fixture
def apples(tmp_path, monkeypatch):
    """A package of one's own with a trainable in it, and things beside it that must not travel."""
    package = tmp_path / "mine" / "apples"
    for name in (
        ".git/objects/pack",
        "__pycache__/fit.pyc",
        "grainmill-runs/a/done.json",
        ".venv/bin/python",
        "parts/x.txt",
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes(bytes(1000))
    (package / "__init__.py").write_text("")
    (package / "red.py").write_text("")
    (tmp_path / "mine" / "secret.txt").write_text("not a part of it")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "my own.yaml").write_text("name: mine\n")
    monkeypatch.syspath_prepend(tmp_path / "mine")
    import apples.red

    yield types.SimpleNamespace(module=apples.red, folder=package, file=tmp_path / "far" / "my own.yaml")
    for name in ("apples", "apples.red"):
        del sys.modules[name]


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_code_and_file_travel_and_nothing_else(apples, tmp_path):
    packed = submission.package_job(apples.file, "apples.red", apples.module, tmp_path / "job")
    source = Path(submission.__file__).parents[1]
    code = [path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    mill = {f"platform/grainmill/{path.relative_to(source)}" for path in code}
    own = {"my own.yaml", "trainables/apples/__init__.py", "trainables/apples/red.py", "trainables/apples/parts/x.txt"}
    found = files(packed.folder)
    assert {name for name in found if ".dist-info/" not in name} == mill | own | {"commit.json"}
    assert packed.files == len(mill) + len(own)
    assert packed.bytes == 1011 + sum(path.stat().st_size for path in code)
    left_out = {name: count for name, count in packed.left_out.items() if name in (".git", ".venv", "grainmill-runs")}
    assert left_out == {".git": 1, ".venv": 1, "grainmill-runs": 1}


def test_what_was_sent_before_under_a_name_is_dropped(tmp_path):
    for name in ("grainmill-demo-2", "grainmill-demo-10", "grainmill-demo-2-3", "grainmill-demos-1", "demo-1"):
        (tmp_path / name / "platform").mkdir(parents=True)
    submission.delete_old_packages(tmp_path, "demo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-1", "grainmill-demo-2-3", "grainmill-demos-1"]
    submission.delete_old_packages(tmp_path / "none", "demo")


def test_commit_travels_with_the_code(apples, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "commit", lambda: {"mlflow.source.git.commit": "abc", "git.dirty": "false"})
    packed = submission.package_job(apples.file, "apples.red", apples.module, tmp_path / "job")
    monkeypatch.chdir(packed.folder)
    assert provenance.commit() == {"mlflow.source.git.commit": "abc", "git.dirty": "false"}


@pytest.mark.parametrize("lost", ["typer", "mlflow"], ids=["at once", "later"])
def test_image_that_lacks_a_requirement_is_told(tmp_path, lost):
    packed = submission.package_job(DEMO, "toy", trainable.find("toy"), tmp_path / "job")
    (packed.folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{lost!r}] = None\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packed.folder), "platform", "trainables"])}
    words = [sys.executable, "-m", "grainmill", "tune", "demo.yaml", "--set", f"storage={tmp_path}"]
    ran = subprocess.run(words, cwd=packed.folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert f"has no module {lost}; use an image" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_module_that_is_no_package_travels_as_its_file(tmp_path):
    packed = submission.package_job(DEMO, "toy", trainable.find("toy"), tmp_path / "job")
    assert {name for name in files(packed.folder) if name.startswith("trainables")} == {"trainables/toy.py"}


def test_what_is_sent_runs_by_itself_and_finds_installed_trainables(tmp_path):
    pytest.importorskip("torch")
    packed = submission.package_job(DEMO, "multigrain", trainable.find("multigrain"), tmp_path / "job")
    line = submission.submit_command(HEAD, "grainmill-demo-1", packed, "validate", DEMO, ["name=other"])
    environment = json.loads(line[line.index("--runtime-env-json") + 1])["env_vars"]
    _, *words = line[line.index("--") + 1 :]
    code = (
        "import sys, grainmill, multigrain.trainable; from importlib.metadata import distribution; "
        "print(grainmill.__file__); print(multigrain.trainable.__file__); print(distribution('grainmill')._path)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=packed.folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert all(place.startswith(str(packed.folder)) for place in told), told
    ran = subprocess.run(
        [sys.executable, *words],
        cwd=packed.folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "demo.yaml is right." in ran.stdout


def test_too_large_a_job_is_refused_before_it_is_copied(apples, tmp_path):
    with (apples.folder / "parts" / "images.tar").open("wb") as large:
        large.truncate(submission.LIMIT_BYTES)
    with pytest.raises(SubmissionError, match=r"at most 100\.0 MiB, got 10\d\.\d MiB: \S+images\.tar \(100\.0 MiB\)"):
        submission.package_job(apples.file, "apples.red", apples.module, tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_storage_must_outlive_the_job(tmp_path):
    with pytest.raises(SubmissionError, match=r"got 'grainmill-runs'; name one, for example --set storage=/"):
        submission.check_storage(experiment.load(DEMO))
    for place in (tmp_path, "s3://bucket/runs"):
        submission.check_storage(experiment.load(DEMO, [f"storage={place}"]))


def test_data_of_the_cluster_need_not_be_here(tmp_path):
    content = {"name": "far", "data": {"folder": "/no/such/images"}, "objective": {"top1": "max"}}
    content |= {"search": {"warm_start": "/no/such/run"}}
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(content))
    assert experiment.load(tmp_path / "far.yaml", here=False).data.folder == "/no/such/images"
    with pytest.raises(ExperimentError, match="/no/such/images"):
        experiment.load(tmp_path / "far.yaml")


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(self.server.code)
        told = json.dumps({"version": "4", "ray_version": self.server.ray}).encode()
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_):
        pass


@pytest.fixture
def door():
    """A server that answers everybody with its `code` and the version of its `ray`."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    server.code, server.ray = 200, ray.__version__
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_open_cluster_is_taken_on_this_machine_alone(door, monkeypatch):
    address = f"http://127.0.0.1:{door.server_port}"
    client = types.SimpleNamespace(_server_ray_version=ray.__version__)
    monkeypatch.setattr(submission, "JobSubmissionClient", lambda _: client)
    assert submission.connect(address) == client
    monkeypatch.setattr(submission, "_is_loopback", lambda _: False)  # what follows is one far away
    with pytest.raises(
        SubmissionError, match=r"must ask for a token, but whoever reaches http://127.* RAY_AUTH_MODE=token"
    ):
        submission.connect(address)
    door.code = 401
    assert submission.connect(address) == client


def test_head_of_another_ray_is_refused_with_both_versions(door):
    address = f"http://127.0.0.1:{door.server_port}"
    assert submission.connect(address).get_address() == address
    door.ray = "2.59.1"
    with pytest.raises(
        SubmissionError, match=rf"this command, {ray.__version__}, but the head at {address} has 2\.59\.1"
    ):
        submission.connect(address)


def test_loopback_is_told_from_the_rest():
    assert all(submission._is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(submission._is_loopback(host) for host in ("10.0.0.1", "0.0.0.0", "head", "localhost.example", "::"))


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto", "http://", "http://me:secret@head:8265"])
def test_address_that_is_no_dashboard_is_refused(address):
    with pytest.raises(SubmissionError, match="such as http://head:8265, got") as caught:
        submission.connect(address)
    assert "secret" not in str(caught.value)


def test_head_that_is_not_there_is_told():
    with pytest.raises(SubmissionError, match=r"must answer at http://127\.0\.0\.1:9, but did not: .*refused"):
        submission.connect("http://127.0.0.1:9")

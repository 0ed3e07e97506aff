"""Files that travel with a job and files that stay; the files that are sent run by themselves."""

import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
from commands import SUPPORT

from grainmill import trainable
from grainmill.cluster import job_files, submission
from grainmill.errors import SubmissionError
from grainmill.storage import provenance

DEMO = SUPPORT.parents[1] / "search_spaces" / "demo.yaml"
HEAD = "http://127.0.0.1:8265"


def write_job(file, name, module, folder):
    job = job_files.list_job(file, module)
    job_files.write_job(job, name, folder)
    return job


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
    job = write_job(apples.file, "apples.red", apples.module, tmp_path / "job")
    source = Path(submission.__file__).parents[1]
    code = [path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    mill = {f"platform/grainmill/{path.relative_to(source)}" for path in code}
    own = {"my own.yaml", "trainables/apples/__init__.py", "trainables/apples/red.py", "trainables/apples/parts/x.txt"}
    found = files(tmp_path / "job")
    assert {name for name in found if ".dist-info/" not in name} == mill | own | {"commit.json"}
    assert {str(target) for target in job.sent} == mill | own
    assert job.bytes == 1011 + sum(path.stat().st_size for path in code)
    stay = (".git", ".venv", "__pycache__", "grainmill-runs")
    assert own_left_out(job) == dict.fromkeys(stay, job_files.NO_CODE)


def own_left_out(job):
    """Files and folders of the package that stay, by their path in it, with the reason."""
    beginning = "trainables/apples/"
    return {path.removeprefix(beginning): why for path, why in job.left_out.items() if path.startswith(beginning)}


def own_sent(job):
    return {str(path.relative_to("trainables/apples")) for path in job.sent if path.is_relative_to("trainables/apples")}


SECRETS = [
    *(
        "id_rsa",
        "id_rsa.pub",
        "id_ed25519.bak",
        "deploy_rsa",
        "server.pem",
        "tls.KEY",
        "a.p12",
        "b.pfx",
        "c.jks",
        "d.ppk",
    ),
    *("prod.env", "env", "prod.env.local", "netrc", "_netrc", "pgpass.conf", "pgpass", "my.cnf", "htpasswd"),
    *(
        "credentials",
        "credentials.json",
        "aws-credentials.csv",
        "client_secret_1.json",
        "Secrets.yaml",
        "passwords.txt",
    ),
    *(
        "kubeconfig",
        "kubeconfig.yaml",
        "prod.kubeconfig",
        "kube-config",
        "service-account.json",
        "api_key.txt",
        "apikey",
    ),
    *(
        "token",
        "hf_token",
        "hf-token.txt",
        "openai.key",
        "openai_key.txt",
        "private-key",
        "auth.json",
        "terraform.tfstate",
    ),
    *("backup.asc", "vault.kdbx", "signing.gpg", "vpn.ovpn", "prod.tfvars", "docker-config.json", "_pypirc", "npmrc"),
]
FOLDERS = ["keys", "deploy-keys", "secrets", "aws", "ssh", "my-credentials", "private", "certs", "kube"]
HARMLESS = [
    "keys.py",
    "token.py",
    "secrets.py",
    "tokenizer.json",
    "environment.yaml",
    "keyboard.txt",
    "monkey.png",
    "author",
]


def test_keys_and_credentials_stay_and_are_told(apples, tmp_path):
    for name in (*SECRETS, *HARMLESS, *(f"{folder}/x.txt" for folder in FOLDERS), "deep/er/prod.env"):
        (apples.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (apples.folder / name).write_text("")
    job = job_files.list_job(apples.file, apples.module)
    stays = {*SECRETS, *FOLDERS, "deep/er/prod.env"}
    told = {path for path, why in own_left_out(job).items() if why == job_files.SECRET}
    assert told == stays
    assert own_sent(job) == {"__init__.py", "red.py", "parts/x.txt", *HARMLESS}


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN OPENSSH PRIVATE KEY-----\nabc",
        "-----BEGIN PRIVATE KEY-----\n",
        '{"type": "service_account", "x": "-----BEGIN RSA PRIVATE KEY-----"}',
        "PuTTY-User-Key-File-3: ssh-rsa",
        "[default]\naws_secret_access_key = x",
        "users:\n- user: {client-key-data: x}",
    ],
)
def test_a_key_of_any_name_stays(apples, text):
    (apples.folder / "notes.txt").write_text(text)
    assert own_left_out(job_files.list_job(apples.file, apples.module))["notes.txt"] == "holds a key"


def test_no_link_leads_out_of_a_package(apples, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/passwords").write_text("secret")
    (apples.folder / "prod.env").write_text("secret")
    (apples.folder / "keys").mkdir()
    (apples.folder / "keys/x.txt").write_text("secret")
    links = {
        "file": tmp_path / "out/passwords",
        "folder": tmp_path / "out",
        "twice": "folder",
        "up": "..",
        "beside": "../secret.txt",
        "gone": "nowhere",
        "lost": "/nowhere",
        "itself": "itself",
        "loop": ".",
        "parts/back": "..",
        "plain.txt": "prod.env",
        "plain": "keys",
        "plain.py": "keys/x.txt",
        "repository": ".git/objects/pack",
        "inside.txt": "parts/x.txt",
        "inside": "parts",
    }
    for name, target in links.items():
        (apples.folder / name).symlink_to(target)
    job = write_job(apples.file, "apples.red", apples.module, tmp_path / "job")
    out, loop, secret = (
        "is a link out of the package",
        "leads back to itself",
        "may hold keys or credentials, by its name",
    )
    told = own_left_out(job)
    assert {name: told[name] for name in ("file", "folder", "twice", "up", "beside", "lost")} == dict.fromkeys(
        ("file", "folder", "twice", "up", "beside", "lost"), out
    )
    assert {told["gone"], told["itself"]} == {"is neither a file nor a folder"}
    assert {told["loop"], told["parts/back"], told["inside/back"]} == {loop}
    assert {told[name] for name in ("plain.txt", "plain", "plain.py", "keys", "prod.env")} == {secret}
    assert told["repository"] == job_files.NO_CODE
    assert own_sent(job) == {"__init__.py", "red.py", "parts/x.txt", "inside.txt", "inside/x.txt"}
    written = [path for path in (tmp_path / "job").rglob("*") if path.is_file()]
    assert not any(path.is_symlink() or path.read_bytes() == b"secret" for path in written)


def test_what_is_no_file_is_not_waited_for(apples):
    os.mkfifo(apples.folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(apples.folder / "s"))
        told = own_left_out(job_files.list_job(apples.file, apples.module))
    assert {told["pipe"], told["s"]} == {"is neither a file nor a folder"}


def test_a_package_that_is_itself_a_link_travels(apples, tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to(apples.folder)
    monkeypatch.setattr(sys.modules["apples"], "__path__", [str(tmp_path / "linked")])
    job = job_files.list_job(apples.file, apples.module)
    assert Path("trainables/linked/red.py") in job.sent


def test_commit_travels_with_the_code(apples, tmp_path, monkeypatch):
    monkeypatch.setattr(job_files, "commit", lambda: {"mlflow.source.git.commit": "abc", "git.dirty": "false"})
    write_job(apples.file, "apples.red", apples.module, tmp_path / "job")
    monkeypatch.chdir(tmp_path / "job")
    assert provenance.commit() == {"mlflow.source.git.commit": "abc", "git.dirty": "false"}


@pytest.mark.parametrize("lost", ["typer", "mlflow"], ids=["at once", "later"])
def test_image_that_lacks_a_requirement_is_told(tmp_path, lost):
    write_job(DEMO, "toy", trainable.find("toy"), tmp_path / "job")
    ((tmp_path / "job") / "sitecustomize.py").write_text(f"import sys\nsys.modules[{lost!r}] = None\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "job"), "platform", "trainables"])}
    words = [sys.executable, "-m", "grainmill", "tune", "demo.yaml", "--set", f"storage={tmp_path}"]
    ran = subprocess.run(words, cwd=tmp_path / "job", env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert f"has no module {lost}; use an image" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_module_that_is_no_package_travels_as_its_file(tmp_path):
    write_job(DEMO, "toy", trainable.find("toy"), tmp_path / "job")
    assert {name for name in files(tmp_path / "job") if name.startswith("trainables")} == {"trainables/toy.py"}


def test_what_is_sent_runs_by_itself_and_finds_installed_trainables(tmp_path):
    pytest.importorskip("torch")
    write_job(DEMO, "multigrain", trainable.find("multigrain"), tmp_path / "job")
    line = submission.submit_command(HEAD, "grainmill-demo-1", tmp_path / "job", "validate", DEMO, ["name=other"])
    environment = json.loads(line[line.index("--runtime-env-json") + 1])["env_vars"]
    _, *words = line[line.index("--") + 1 :]
    code = (
        "import sys, grainmill, multigrain.trainable; from importlib.metadata import distribution; "
        "print(grainmill.__file__); print(multigrain.trainable.__file__); print(distribution('grainmill')._path)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "job",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert all(place.startswith(str(tmp_path / "job")) for place in told), told
    ran = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path / "job",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "demo.yaml is right." in ran.stdout


def test_too_large_a_job_is_refused_before_it_is_copied(apples, tmp_path):
    with (apples.folder / "parts" / "images.tar").open("wb") as large:
        large.truncate(job_files.LIMIT_BYTES)
    with pytest.raises(SubmissionError, match=r"at most 100\.0 MiB, got 10\d\.\d MiB: \S+images\.tar \(100\.0 MiB\)"):
        write_job(apples.file, "apples.red", apples.module, tmp_path / "job")
    assert not (tmp_path / "job").exists()

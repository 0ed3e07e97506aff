"""What a run is told to be made with."""

import subprocess

from grainmill.storage.provenance import PACKAGES, environment


def test_environment_names_packages_and_the_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "mlflow.source.git.commit" not in environment()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    tags = environment()
    assert tags["mlflow.source.git.commit"] == head
    assert tags["git.dirty"] == "false"
    assert set(PACKAGES) <= tags.keys()
    (tmp_path / "new.txt").write_text("")
    assert environment()["git.dirty"] == "true"

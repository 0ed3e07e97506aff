"""Whether it can be told how far a cluster grows: by the file of the autoscaler that runs for it on this machine."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grainmill import capacity, cluster

AWS = Path(__file__).parents[1] / "infra" / "aws" / "cluster.yaml"
ADDRESS = "10.1.2.3:6379"


@pytest.fixture
def autoscaler(tmp_path, monkeypatch):
    """Starts a process that looks like one."""
    monkeypatch.setattr(capacity.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=ADDRESS))
    script = tmp_path / "monitor.py"
    script.write_text("print(flush=True); input()")
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        started.append(process)

    yield start
    for process in started:
        process.communicate("\n")


def test_the_file_of_this_clusters_autoscaler_tells(autoscaler, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("{}")
    autoscaler("--gcs-address=10.1.2.4:6379", f"--autoscaling-config={other}")
    assert capacity.possible() is None
    autoscaler(f"--gcs-address={ADDRESS}", f"--autoscaling-config={AWS}")
    assert capacity.possible() == cluster.read(AWS)


@pytest.mark.parametrize("arguments", [[], ["--autoscaling-config="], ["--autoscaling-config=/none"]])
def test_an_autoscaler_without_a_file_that_we_understand_tells_nothing(autoscaler, arguments):
    autoscaler(f"--gcs-address={ADDRESS}", *arguments)
    assert capacity.possible() is None

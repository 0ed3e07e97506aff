"""The script that passes on AWS's announcement, against a metadata service of our own."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from metadata_service import SCRIPT, Metadata, notice


@pytest.fixture
def metadata():
    made = Metadata()
    yield made
    made.close()


def test_end_is_what_the_service_announces_or_none(metadata):
    assert notice.end(metadata.address) is None
    metadata.announced = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert notice.end(metadata.address) == metadata.announced
    metadata.broken = 1
    with pytest.raises(OSError, match="503"):
        notice.end(metadata.address)


def test_script_drains_the_node_once_ray_takes_note_with_the_time_that_is_left(metadata, tmp_path):
    """With a `ray` that keeps what it is told, and refuses the first time."""
    fake = tmp_path / "ray"
    fake.write_text('#!/bin/sh\necho "$@" >> "$0.told"\n[ $(wc -l < "$0.told") -gt 1 ]\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    metadata.broken = 2  # is asked again
    command = [sys.executable, str(SCRIPT), "--metadata", metadata.address, "--poll", "0.05"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert "503" in process.stdout.readline()
    metadata.announced = datetime.now(UTC) + timedelta(seconds=120)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "this instance ends at 20" in said
    lines = (tmp_path / "ray.told").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        told, seconds = line.rsplit(" ", 1)
        assert told.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message ")
        assert told.endswith("--deadline-remaining-seconds")
        assert 60 < int(seconds) <= 120

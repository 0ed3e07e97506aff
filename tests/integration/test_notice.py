"""The script that passes on AWS's announcement, against a metadata service of our own."""

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "infra" / "aws" / "notice.py"
SPEC = importlib.util.spec_from_file_location("notice", SCRIPT)
notice = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(notice)


class Metadata(http.server.ThreadingHTTPServer):
    """An instance metadata service, version 2, on a port of this machine; `announced` is when the instance ends."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.address, self.announced, self.broken = f"127.0.0.1:{self.server_port}", None, 0
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_PUT(self):
        good = self.path == "/latest/api/token" and int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
        self.answer(200 if good else 400, "a token")

    def do_GET(self):
        if self.headers["X-aws-ec2-metadata-token"] != "a token":
            self.answer(401, "")
        elif self.server.broken:
            self.server.broken -= 1
            self.answer(503, "")
        elif self.path != "/latest/meta-data/spot/instance-action" or not self.server.announced:
            self.answer(404, "")
        else:
            ends = self.server.announced.strftime("%Y-%m-%dT%H:%M:%SZ")
            self.answer(200, json.dumps({"action": "terminate", "time": ends}))

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


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

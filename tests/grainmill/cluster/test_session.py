"""Addresses where no Ray lets a command in."""

import http.server
import re
import subprocess
import sys
import threading

import pytest

from grainmill.cluster import session
from grainmill.errors import ResourceError


class Page(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(params=["nothing", "a dashboard"])
def no_head(request):
    """An address where no head answers."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Page)
    if request.param == "nothing":
        server.server_close()
        yield f"127.0.0.1:{server.server_port}"
        return
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_address_where_no_head_answers_is_refused_soon(no_head, monkeypatch):
    monkeypatch.setattr(session, "HEAD_SECONDS", 1)
    with pytest.raises(
        ResourceError, match=rf"must answer at \S+:{no_head.partition(':')[2]} within 1 seconds, but did"
    ):
        session.check(no_head)


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:8265"])
def test_address_that_is_none_is_refused(address):
    script = "import sys; from grainmill.cluster.session import connect\nwith connect(sys.argv[1]): pass"
    command = [sys.executable, "-c", script, address]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"ResourceError: Ray must let this command in at {address}, but said: Invalid" in told.stderr


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("auto", "needs a Ray that runs on this machine, but there is none; start it with `ray start --head`"),
        ("ray://127.0.0.1:10001", "must be HOST:PORT of a cluster's head, but ray://127.0.0.1:10001 is that of a Ray"),
    ],
)
def test_address_that_trials_cannot_use_is_refused_at_once(address, told, monkeypatch):
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", list)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ResourceError, match=re.escape(told)):
        session.check(address)

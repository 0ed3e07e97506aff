"""Addresses where no Ray lets a command in, and the token of a local Ray."""

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


@pytest.fixture
def token(tmp_path, monkeypatch):
    """Path of the token of a user who has none yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".ray" / "auth_token"


def test_a_local_ray_gets_a_token_that_its_owner_alone_can_read(token):
    session._keep_token_private()
    made = token.read_text()
    assert re.fullmatch("[0-9a-f]{64}", made)
    assert [oct(path.stat().st_mode & 0o777) for path in (token, token.parent)] == ["0o600", "0o700"]
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]
    token.chmod(0o644)  # as Ray writes it
    session._keep_token_private()
    assert oct(token.stat().st_mode & 0o777) == "0o600"
    assert token.read_text() == made


@pytest.mark.parametrize(
    "given", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "x"}, {"RAY_AUTH_TOKEN_PATH": "/secret"}], ids=str
)
def test_no_token_is_made_where_none_is_needed(token, monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    session._keep_token_private()
    assert not token.exists()


def test_a_home_that_cannot_be_written_is_left_to_ray(token):
    token.parent.touch()
    session._keep_token_private()
    assert token.parent.is_file()

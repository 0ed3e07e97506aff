"""An S3 server in this process, and proxies in front of it that count requests and inject faults."""

import http.client
import os
import threading
import uuid
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

SECRET = "very-secret"


class ProxyHandler(BaseHTTPRequestHandler):
    """Passes a GET request on to the server, or injects the next fault of its path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.seen.append((path, self.headers["Range"]))
        listing = "list-type" in self.path
        fault = server.faults.get(path, [None]).pop(0) if server.faults.get(path) else None
        if callable(fault):
            fault()
        status, headers, body = server.ask(self.path + (server.page if listing else ""), self.headers)
        if isinstance(fault, tuple):
            status, code = fault
            headers, body = {}, f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
        for old, new in server.renamed.items() if listing else ():
            body = body.replace(old, new)
        told = body if fault != "shorter" else body[: len(body) // 2]
        self.send_response(status)
        for name in ("ETag", "Content-Range", "Content-Type", "Last-Modified"):
            if name in headers:
                self.send_header(name, headers[name])
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told if fault != "cut" else told[: len(told) // 2])
        self.close_connection = fault == "cut"

    def log_message(self, *_):
        pass


class Proxy(ThreadingHTTPServer):
    """A proxy in front of the S3 server that records GET requests and injects faults.

    `faults` maps a path to faults, one for each request: `(status, code)` is sent as the answer; `shorter` sends half
    the content as if it were all; `cut` breaks off in the middle; a function is called before the request passes.
    """

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.port, self.seen, self.faults, self.renamed, self.page = port, [], {}, {}, ""

    def ask(self, path, headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            connection.request("GET", path, headers={name: text for name, text in headers.items() if name != "Host"})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def handle_error(self, *_):
        """Ignore clients that hang up."""

    def got(self):
        """Return path -> number of requests, for objects only."""
        return Counter(path for path, _ in self.seen if path.count("/") > 1)


@pytest.fixture(scope="session")
def moto():
    """An S3 server in a thread of this process, and a client of it. All tests share it; each makes its own buckets."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    client = boto3.session.Session("key", "secret", region_name="us-east-1").client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}"
    )
    yield SimpleNamespace(port=port, client=client)
    client.close()
    server.stop()


@contextmanager
def serving(server):
    """Run a server in a thread until the block ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def proxy(moto):
    """The endpoint of `bucket` in tests that only read: it counts requests and injects faults."""
    with serving(Proxy(moto.port)) as server:
        yield server


@pytest.fixture
def door(moto):
    """The endpoint of `bucket` in tests that write: it records requests of all methods and injects faults."""
    with serving(Door(moto.port)) as server:
        yield server


@pytest.fixture(scope="session")
def botocore_loader():
    """Botocore's service descriptions, loaded once, because loading takes longer than a test."""
    from botocore.loaders import Loader

    return Loader()


@pytest.fixture
def waits(monkeypatch):
    """List of the seconds that botocore would wait between two requests. It does not wait."""
    waits = []
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def bucket(request, moto, botocore_loader, monkeypatch, waits):
    """A new bucket, filled directly on the server. The endpoint in the environment is the test's door, or the proxy."""
    endpoint = request.getfixturevalue("door" if "door" in request.fixturenames else "proxy")
    monkeypatch.setattr("botocore.session.create_loader", lambda _: botocore_loader)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{endpoint.server_port}")
    name = f"bucket-{uuid.uuid4().hex}"
    moto.client.create_bucket(Bucket=name)
    return SimpleNamespace(
        name=name,
        put=lambda **bodies: [moto.client.put_object(Bucket=name, Key=key, Body=body) for key, body in bodies.items()],
        delete=lambda key: moto.client.delete_object(Bucket=name, Key=key),
        objects=lambda: moto.client.list_objects_v2(Bucket=name).get("Contents", []),
    )


class DoorHandler(BaseHTTPRequestHandler):
    """Passes a request of any method on to the server, or injects the fault that the door's rule returns."""

    protocol_version = "HTTP/1.1"

    def do(self):
        place = urlsplit(self.path)
        key = unquote(place.path).partition("/")[2].partition("/")[2]
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.server.rule(self.command, key, place.query)
        self.server.seen.append((self.command, key))
        if fault == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if isinstance(fault, tuple):
            status, code = fault
            headers, told = {}, f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
        else:
            status, headers, told = self.server.ask(self.command, self.path, self.headers, body)
        if fault == "lost":
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, text in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "server"):
                self.send_header(name, text)
        self.send_header("Content-Length", headers["Content-Length"] if self.command == "HEAD" else str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def __getattr__(self, name):
        """Return the handler of every method: `do_GET`, `do_PUT` and so on."""
        if name.startswith("do_"):
            return self.do
        raise AttributeError(name)

    def log_message(self, *_):
        pass


class Door(ThreadingHTTPServer):
    """A proxy in front of the S3 server that records all requests and injects faults by a rule.

    `rule(method, key, query)` returns None or a fault: `(status, code)` is the answer; `cut` closes the connection
    while the request is being read; `lost` passes the request on and closes the connection without an answer.
    """

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), DoorHandler)
        self.port, self.seen, self.rule = port, [], lambda *_: None

    def ask(self, method, path, headers, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            passed = {name: text for name, text in headers.items() if name.lower() not in ("host", "expect")}
            connection.request(method, path, body, passed)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def handle_error(self, *_):
        """Ignore clients that hang up."""

    def wrote(self):
        """Return (method, key) of the PUT and DELETE requests, in order."""
        return [(method, key) for method, key in self.seen if method in ("PUT", "DELETE")]


@pytest.fixture
def place(bucket, door, tmp_path, monkeypatch):
    """The URL of an empty folder in S3, behind the door; its local copies lie below `tmp_path`."""
    from grainmill.storage import s3, workspace

    monkeypatch.setattr(workspace, "WORK", str(tmp_path / "work"))
    monkeypatch.setattr(s3, "PAUSES", (0.0,))
    return f"s3://{bucket.name}/runs/trial-0001"


def files(folder, read=Path.read_text):
    """Return name -> content of the files below a folder."""
    return {str(path.relative_to(folder)): read(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def seen_by_another(place, read=Path.read_text):
    """Return name -> content of the files that another process would find at a place."""
    from grainmill.storage import workspace

    with workspace.opened(place) as kept:
        return files(kept.path, read)


def failing(times, fault, *, of="PUT", key=""):
    """Return a rule that injects a fault into the next `times` requests of a method whose key contains `key`."""
    left = [times]

    def rule(method, name, _):
        if method == of and name.endswith(key) and left[0]:
            left[0] -= 1
            return fault
        return None

    return rule

"""A door before a server of S3: sees what is written and read, and slams as it is told to."""

import http.client
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SECRET = "very-secret"


class Handler(BaseHTTPRequestHandler):
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
        """`do_GET` and the others."""
        if name.startswith("do_"):
            return self.do
        raise AttributeError(name)

    def log_message(self, *_):
        pass


class Door(ThreadingHTTPServer):
    """`rule(method, key, query)` returns a fault, or None: `(status, code)`; `cut`: hangs up while it is told;
    `lost`: does it, and hangs up."""

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), Handler)
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
        """A client that went away is no news."""

    def wrote(self):
        """Names that were put or deleted, in order."""
        return [(method, key) for method, key in self.seen if method in ("PUT", "DELETE")]

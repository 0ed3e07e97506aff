"""A stand-in for the instance metadata service of AWS, and the script of infra/aws that reads it."""

import http.server
import importlib.util
import json
import threading

from commands import ROOT

SCRIPT = ROOT / "infra" / "aws" / "notice.py"
SPEC = importlib.util.spec_from_file_location("notice", SCRIPT)
notice = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(notice)


class Metadata(http.server.ThreadingHTTPServer):
    """An instance metadata service, version 2, on a local port. `announced` is the time when the instance ends."""

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

"""Whether it can be told how far a cluster grows: by what its autoscaler reads, a file or an object of Kubernetes."""

import json
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme
import yaml
from ray.autoscaler._private.kuberay import node_provider

from grainmill.cluster import capacity, shape

AWS = Path(__file__).parents[3] / "infra" / "aws" / "cluster.yaml"
KUBERAY = AWS.parents[1] / "kuberay" / "cluster.yaml"
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
    assert capacity.possible_cluster() is None
    autoscaler(f"--gcs-address={ADDRESS}", f"--autoscaling-config={AWS}")
    assert capacity.possible_cluster() == shape.read_cluster(AWS)


@pytest.mark.parametrize("arguments", [[], ["--autoscaling-config="], ["--autoscaling-config=/none"]])
def test_an_autoscaler_without_a_file_that_we_understand_tells_nothing(autoscaler, arguments):
    autoscaler(f"--gcs-address={ADDRESS}", *arguments)
    assert capacity.possible_cluster() is None


@pytest.fixture
def kubernetes(tmp_path, monkeypatch):
    """Its server, that shows the namespace `mills` to whom it knows, as a head's pod sees it; its RayClusters."""
    objects = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers["Authorization"] == "Bearer of the head"
            found = objects.get(self.path.removeprefix("/apis/ray.io/v1/namespaces/mills/rayclusters/"))
            self.send_response(403 if not known else 404 if found is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *words):
            pass

    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    (tmp_path / "token").write_text("of the head")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(node_provider, "IN_CLUSTER_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(node_provider, "IN_CLUSTER_CA_CERT_PATH", str(tmp_path / "ca.crt"))
    host = f"127.0.0.1:{server.server_port}"  # read from the variables when the module is imported
    monkeypatch.setattr(node_provider.url_from_resource, "__defaults__", ("v1", host))
    monkeypatch.setattr(capacity.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=ADDRESS))
    monkeypatch.setenv("RAY_CLUSTER_NAME", "grainmill")
    monkeypatch.setenv("RAY_CLUSTER_NAMESPACE", "mills")
    yield objects
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_object_of_this_pods_cluster_tells(kubernetes):
    assert capacity.possible_cluster() is None
    kubernetes["grainmill"] = yaml.safe_load(KUBERAY.read_text()) | {"status": {"state": "ready"}}
    assert capacity.possible_cluster() == shape.read_cluster(KUBERAY)


def test_a_pod_that_may_not_read_it_or_has_no_token_tells_nothing(kubernetes, tmp_path):
    kubernetes["grainmill"] = yaml.safe_load(KUBERAY.read_text())
    (tmp_path / "token").write_text("of a worker")
    assert capacity.possible_cluster() is None
    (tmp_path / "token").unlink()
    assert capacity.possible_cluster() is None


def test_an_object_that_we_do_not_understand_tells_nothing(kubernetes):
    kubernetes["grainmill"] = {"kind": "RayCluster", "spec": {}}
    assert capacity.possible_cluster() is None

"""What travels with a job, under which name, and to which clusters; and real jobs on a cluster that wants a token."""

import http.server
import json
import threading
import types

import pytest
import ray
import yaml
from commands import SUPPORT
from ray.job_submission import JobStatus

from grainmill.cluster import submission
from grainmill.config import experiment
from grainmill.errors import ExperimentError, SubmissionError

DEMO = SUPPORT.parents[1] / "search_spaces" / "demo.yaml"
HEAD = "http://127.0.0.1:8265"


def client(**states):
    """Of a cluster with jobs by id; `_` stands for a hyphen."""
    jobs = [
        types.SimpleNamespace(submission_id=name.replace("_", "-"), status=JobStatus(state))
        for name, state in states.items()
    ]
    jobs.append(
        types.SimpleNamespace(submission_id=None, status=JobStatus.RUNNING)
    )  # of a driver that was not submitted
    return types.SimpleNamespace(list_jobs=lambda: jobs)


def test_id_is_the_next_of_its_name():
    assert submission.next_submission_id(client(), HEAD, "demo") == "grainmill-demo-1"
    others = client(grainmill_demo_2_7="RUNNING", grainmill_demos_3="RUNNING", other_demo_4="PENDING")
    assert submission.next_submission_id(others, HEAD, "demo") == "grainmill-demo-1"
    ended = client(grainmill_demo_9="FAILED", grainmill_demo_10="SUCCEEDED", grainmill_demo_2="STOPPED")
    assert submission.next_submission_id(ended, HEAD, "demo") == "grainmill-demo-11"
    assert submission.next_submission_id(client(grainmill_axb_1="RUNNING"), HEAD, "a.b") == "grainmill-a.b-1"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_name_whose_job_is_not_at_its_end_is_refused(state):
    jobs = client(grainmill_demo_1="FAILED", grainmill_demo_2=state)
    with pytest.raises(SubmissionError, match=f"but grainmill-demo-2 is {state.lower()}; wait") as caught:
        submission.next_submission_id(jobs, HEAD, "demo")
    assert f"ray job logs --follow --address {HEAD} grainmill-demo-2" in str(caught.value)
    assert f"ray job stop --address {HEAD} grainmill-demo-2" in str(caught.value)


def test_what_was_sent_before_under_a_name_is_dropped(tmp_path):
    for name in ("grainmill-demo-2", "grainmill-demo-10", "grainmill-demo-2-3", "grainmill-demos-1", "demo-1"):
        (tmp_path / name / "platform").mkdir(parents=True)
    submission.delete_old_packages(tmp_path, "demo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-1", "grainmill-demo-2-3", "grainmill-demos-1"]
    submission.delete_old_packages(tmp_path / "none", "demo")


def test_storage_must_outlive_the_job(tmp_path):
    with pytest.raises(SubmissionError, match=r"got 'grainmill-runs'; name one, for example --set storage=/"):
        submission.check_storage(experiment.load(DEMO))
    for place in (tmp_path, "s3://bucket/runs"):
        submission.check_storage(experiment.load(DEMO, [f"storage={place}"]))


def test_data_of_the_cluster_need_not_be_here(tmp_path):
    content = {"name": "far", "data": {"folder": "/no/such/images"}, "objective": {"top1": "max"}}
    content |= {"search": {"warm_start": "/no/such/run"}, "base": {"model": {"weights": "/no/such/weights"}}}
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(content))
    assert experiment.load(tmp_path / "far.yaml", here=False).data.folder == "/no/such/images"
    with pytest.raises(ExperimentError, match="/no/such/images") as caught:
        experiment.load(tmp_path / "far.yaml")
    assert "base.model.weights: must be random, zoo or a file" in str(caught.value)


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(self.server.code)
        told = json.dumps({"version": "4", "ray_version": self.server.ray}).encode()
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_):
        pass


@pytest.fixture
def door():
    """A server that answers everybody with its `code` and the version of its `ray`."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    server.code, server.ray = 200, ray.__version__
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_open_cluster_is_taken_on_this_machine_alone(door, monkeypatch):
    address = f"http://127.0.0.1:{door.server_port}"
    client = types.SimpleNamespace(_server_ray_version=ray.__version__)
    monkeypatch.setattr(submission, "JobSubmissionClient", lambda _: client)
    assert submission.connect(address) == client
    monkeypatch.setattr(submission, "_is_loopback", lambda _: False)  # what follows is one far away
    with pytest.raises(
        SubmissionError, match=r"must ask for a token, but whoever reaches http://127.* RAY_AUTH_MODE=token"
    ):
        submission.connect(address)
    door.code = 401
    assert submission.connect(address) == client


def test_head_of_another_ray_is_refused_with_both_versions(door):
    address = f"http://127.0.0.1:{door.server_port}"
    assert submission.connect(address).get_address() == address
    door.ray = "2.59.1"
    with pytest.raises(
        SubmissionError, match=rf"this command, {ray.__version__}, but the head at {address} has 2\.59\.1"
    ):
        submission.connect(address)


def test_loopback_is_told_from_the_rest():
    assert all(submission._is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(submission._is_loopback(host) for host in ("10.0.0.1", "0.0.0.0", "head", "localhost.example", "::"))


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto", "http://", "http://me:secret@head:8265"])
def test_address_that_is_no_dashboard_is_refused(address):
    with pytest.raises(SubmissionError, match="such as http://head:8265, got") as caught:
        submission.connect(address)
    assert "secret" not in str(caught.value)


def test_head_that_is_not_there_is_told():
    with pytest.raises(SubmissionError, match=r"must answer at http://127\.0\.0\.1:9, but did not: .*refused"):
        submission.connect("http://127.0.0.1:9")

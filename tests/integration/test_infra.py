"""The tracking server of infra/mlflow: its files fit together, and its command serves from PostgreSQL and S3."""

import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import boto3
import mlflow
import pandas as pd
import pytest
import toy
import yaml
from moto.server import ThreadedMotoServer
from servers import TrackingServer
from toy_settings import CARD

from grainmill.errors import TrackingError
from grainmill.registry import comparison, models, promotion
from grainmill.tracking.mlflow_runs import Tracker

FOLDER = Path(__file__).parents[2] / "infra" / "mlflow"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SECRETS = {
    "MLFLOW_ADMIN": "chief",
    "MLFLOW_ADMIN_PASSWORD": "very-secret-admin",
    "MLFLOW_SECRET_KEY": "very-secret-key",
    "POSTGRES_PASSWORD": "very-secret-base",
    "S3_USER": "key",
    "S3_PASSWORD": "very-secret-store",
    "ALLOWED_HOSTS": "mill.example:*,127.0.0.1:*",
}


def environment(service):
    """Of a service, with the variables filled in as compose does."""
    return {
        name: re.sub(r"\$\{(\w+):\?\}", lambda found: SECRETS[found[1]], value)
        for name, value in COMPOSE["services"][service]["environment"].items()
    }


def test_every_variable_is_in_the_example_and_no_secret_has_a_value():
    used = set(re.findall(r"\$\{?(\w+)", (FOLDER / "compose.yaml").read_text()))
    lines = (FOLDER / ".env.example").read_text().splitlines()
    told = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert used == told.keys() == SECRETS.keys()
    assert all(not told[name] for name in told if "PASSWORD" in name or "SECRET" in name)
    for service in COMPOSE["services"].values():
        for name, value in service.get("environment", {}).items():
            assert "$" in value or not re.search("PASSWORD|SECRET|_KEY", name), name


def test_services_volumes_and_files_that_are_named_are_there():
    services = COMPOSE["services"]
    for service in services.values():
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_completed_successfully"} or "healthcheck" in services[other]
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert ("image" in service) != ("build" in service)
    copied = re.search(r"COPY (\S+) (\S+)", (FOLDER / "Dockerfile").read_text())
    assert (FOLDER / copied[1]).is_file()
    assert environment("mlflow")["MLFLOW_AUTH_CONFIG_PATH"] == copied[2]
    assert f"ARG MLFLOW={mlflow.__version__}\n" in (FOLDER / "Dockerfile").read_text()


@pytest.fixture
def served(postgres, tmp_path, monkeypatch):
    """The server by the command of the compose file, on other addresses; and the client of its store."""
    import psycopg

    with psycopg.connect(postgres.url(), autocommit=True) as base:
        base.execute("CREATE DATABASE mlflow")
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    address = f"http://127.0.0.1:{store.get_host_and_port()[1]}"
    s3 = boto3.session.Session("key", "secret", region_name="us-east-1").client("s3", endpoint_url=address)
    s3.create_bucket(Bucket="mlflow")
    made = TrackingServer.__new__(TrackingServer)
    made.choose_port()
    program, *words = COMPOSE["services"]["mlflow"]["command"]
    places = {
        "MLFLOW_HOST": "127.0.0.1",
        "MLFLOW_PORT": str(made.port),
        "MLFLOW_AUTH_CONFIG_PATH": str(FOLDER / "auth.ini"),
        "MLFLOW_S3_ENDPOINT_URL": address,
        "PGHOST": "127.0.0.1",
        "PGPORT": str(postgres.port),
        "PGUSER": "mill",
    }
    monkeypatch.chdir(tmp_path)
    made.start([sys.executable, "-m", program, *words], **environment("mlflow") | places)
    yield made, s3
    made.end()
    s3.close()
    store.stop()


def status(uri, host):
    request = urllib.request.Request(f"{uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=x")
    request.add_header("Host", host)
    try:
        return urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.slow
def test_the_same_calls_as_with_sqlite_register_promote_and_load_a_model(served, tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    server, s3 = served
    assert status(server.uri, "mill.example:80") == 401
    assert status(server.uri, "evil.example") == 403
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_USERNAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrackingError, match=r"must answer at http://127\.0\.0\.1:.* but said: .*[Aa]uth"):
        Tracker(server.uri, "apples", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "chief")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "very-secret-admin")
    tracker = Tracker(server.uri, "apples", tmp_path)
    for height in (0.25, 0.75):
        folder = tmp_path / str(height)
        list(toy.fit(toy.Spec(height=height), toy.Data(), folder))
        run_id = tracker.start(f"run of {height}", {"height": height}, {})
        version = models.register(tracker, run_id, "apples", folder, toy.example(toy.Data()), {}, CARD)
        comparison.save(tracker.client, version, run_id, [toy.QueryScores("copies/map", "same", [height] * 20, False)])
    promotion.promote(server.uri, "models:/apples@challenger", ["metric=copies/map"], print)
    assert promotion.rollback(server.uri, "apples", print).champion.number == "1"
    assert promotion.promote(server.uri, "models:/apples/2", ["metric=copies/map"], print).champion.number == "2"
    mlflow.set_tracking_uri(server.uri)
    model = mlflow.pyfunc.load_model("models:/apples@champion")
    assert model.predict(pd.DataFrame({"x": [2.0]}))["y"].tolist() == [1.5]
    kept = [one["Key"] for one in s3.list_objects_v2(Bucket="mlflow")["Contents"]]
    assert sum(key.endswith("MLmodel") for key in kept) == 2
    assert list(tmp_path.glob("*.db")) == []
    assert "very-secret" not in "".join(server.said)

"""The tracking server of infra/mlflow: its files fit together, and its command serves from PostgreSQL and S3."""

import sys
import urllib.error
import urllib.request

import boto3
import mlflow
import pandas as pd
import pytest
import toy
from mlflow_compose import COMPOSE, FOLDER, environment
from moto.server import ThreadedMotoServer
from servers import TrackingServer
from toy_settings import CARD

from grainmill.errors import TrackingError
from grainmill.registry import comparison, models, promotion
from grainmill.tracking.mlflow_runs import Tracker


@pytest.fixture
def served(postgres, tmp_path, monkeypatch):
    """Run the server by the command of the compose file, on other addresses; yields also a client of its store."""
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
        run_id = tracker.start(f"run of {height}", {})
        tracker.parameters(run_id, {"height": height})
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

"""The files of infra/mlflow fit together."""

import re

import mlflow
from mlflow_compose import COMPOSE, FOLDER, SECRETS, environment


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

"""The compose file of infra/mlflow, with its variables filled in."""

import re

import yaml
from commands import ROOT

FOLDER = ROOT / "infra" / "mlflow"


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
    """Return the environment of a service, with the variables filled in as `docker compose` does."""
    return {
        name: re.sub(r"\$\{(\w+):\?\}", lambda found: SECRETS[found[1]], value)
        for name, value in COMPOSE["services"][service]["environment"].items()
    }

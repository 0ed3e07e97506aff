"""Ray Serve application: embeds images with the version of a registered model that an alias names at the time."""

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any

from mlflow import MlflowClient
from pydantic import Field
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from grainmill.corpus.embedder import Answer, Embedder
from grainmill.errors import ServingError
from grainmill.registry.models import SCHEME, Version, look_up
from grainmill.serve.http import TOKEN, Endpoint, Limits
from grainmill.tracking.mlflow_runs import check_registry

log = logging.getLogger("ray.serve")
DIRECT = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
"""Variables with which replicas listen on their own ports, and do not see which client asks."""


class Settings(Limits):
    """Settings of the application, under `args` in a Serve config file."""

    model: str = Field(pattern=f"^{SCHEME}[^@/]+@[^@/]+$")
    """Model and alias, such as models:/demo@champion."""
    tracking_uri: str
    """Address of MLflow."""
    poll_seconds: float = Field(10, gt=0)
    """Interval at which the alias is looked up, in seconds."""


@serve.deployment
class Service:
    """A replica: a model, and a task that replaces it when the alias has moved."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        check_registry(settings.tracking_uri)
        self.client = MlflowClient(settings.tracking_uri)
        self.embedder = Embedder(settings.tracking_uri, self._named())
        token = os.environ.get(TOKEN)
        self._endpoint = Endpoint(self._embed, lambda: self.embedder.identity.model, settings, token)
        self._watch = asyncio.get_event_loop().create_task(self._follow())

    async def __call__(self, request: Request) -> Response:
        return await self._endpoint(request)

    def _embed(self, contents: Sequence[bytes]) -> tuple[str, Sequence[Answer]]:
        """Embed a batch; returns the version and the answer for each image."""
        embedder = self.embedder  # one version for the whole batch, even if the alias moves
        return embedder.identity.model, embedder(contents)

    async def _follow(self) -> None:
        """Load the version that the alias names whenever it changes. After an error the present version stays."""
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            try:
                named = await asyncio.to_thread(self._named)
                if named != self.embedder.identity.model:
                    self.embedder = await asyncio.to_thread(Embedder, self.settings.tracking_uri, named)
                    log.info("%s is %s now", self.settings.model, named)
            except Exception as error:  # a model can fail to load in any way
                log.warning("%s stays: %s", self.embedder.identity.model, error)

    def _named(self) -> str:
        """URI of the version that the alias names."""
        return Version.of(look_up(self.client, self.settings.model)).uri


def application(arguments: dict[str, Any]) -> serve.Application:
    """Build the application; the `import_path` in `infra/serve/champion.yaml`. The arguments are `Settings`.

    Raises:
        ServingError: there is no token, and replicas listen on all addresses of their machines, as they do with HAProxy
            and direct ingress.
    """
    settings = Settings.model_validate(arguments)
    found = [name for name in DIRECT if os.environ.get(name) == "1"]
    if found and not os.environ.get(TOKEN):
        rule = "a server that other machines can reach must have a token"
        raise ServingError(f"{rule}, but {found[0]}=1 opens the replicas' ports; set {TOKEN}")
    return Service.bind(settings)  # type: ignore[attr-defined]  # the decorator adds `bind`

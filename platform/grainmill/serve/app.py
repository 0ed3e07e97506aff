"""Ray Serve application: embeds images with the version of a registered model that an alias names at the time.

    POST /      an image file -> 200 with `model`, `embedding`, `class_id`, `class_name`, `score`,
                or 400 with `model` and `error`, the reason why the file is no image
    GET /       -> 200 with `model`, the version that answers

Images that arrive at the same time are embedded in one batch. A bad image does not affect the others.
"""

import asyncio
import logging
from typing import Any

from mlflow import MlflowClient
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from grainmill.corpus.embedder import Answer, Embedder
from grainmill.registry.models import SCHEME, Version, look_up

log = logging.getLogger("ray.serve")


class Settings(BaseModel):
    """Settings of the application, under `args` in a Serve config file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str = Field(pattern=f"^{SCHEME}[^@/]+@[^@/]+$")
    """Model and alias, such as models:/demo@champion."""
    tracking_uri: str
    """Address of MLflow."""
    poll_seconds: float = Field(10, gt=0)
    """Interval at which the alias is looked up, in seconds."""
    batch: int = Field(16, ge=1)
    """Largest number of images in a batch."""
    wait_seconds: float = Field(0.01, ge=0)
    """Longest time in seconds that an image waits for others to fill the batch."""


@serve.deployment
class Service:
    """A replica: a model, and a task that replaces it when the alias has moved."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = MlflowClient(settings.tracking_uri)
        self.embedder = Embedder(settings.tracking_uri, self._named())
        self._answer.set_max_batch_size(settings.batch)
        self._answer.set_batch_wait_timeout_s(settings.wait_seconds)
        self._watch = asyncio.get_event_loop().create_task(self._follow())

    async def __call__(self, request: Request) -> JSONResponse:
        if request.method != "POST":
            return JSONResponse({"model": self.embedder.identity.model})
        model, answer = await self._answer(await request.body())
        if answer.error is not None:
            return JSONResponse({"model": model, "error": answer.error}, status_code=400)
        embedding = answer.embedding.tolist()
        return JSONResponse({"model": model, **answer._asdict(), "embedding": embedding})

    @serve.batch  # type: ignore[untyped-decorator]
    async def _answer(self, contents: list[bytes]) -> list[tuple[str, Answer]]:
        """Embed a batch; returns the version and the answer for each image."""
        embedder = self.embedder  # one version for the whole batch, even if the alias moves
        answers = await asyncio.to_thread(embedder, contents)
        return [(embedder.identity.model, answer) for answer in answers]

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
    """Build the application; the `import_path` in `infra/serve/champion.yaml`. The arguments are `Settings`."""
    return Service.bind(Settings.model_validate(arguments))  # type: ignore[attr-defined]  # the decorator adds `bind`

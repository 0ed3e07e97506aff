"""The application that Ray Serve runs: images in, embeddings out, by the version that an alias names at the time.

    POST /      an image file -> 200 with `model`, `embedding`, `class_id`, `class_name`, `score`,
                or 400 with `error`, which says why it is no image
    GET /       -> 200 with `model`, the version that answers

Images that arrive at the same time are shown to the model together; a bad one leaves the others as they are.
"""

import asyncio
import logging
from typing import Any

from mlflow import MlflowClient
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from grainmill.corpus.embedder import SCHEME, Answer, Embedder

log = logging.getLogger("ray.serve")


class Settings(BaseModel):
    """The `args` of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str = Field(pattern=f"^{SCHEME}[^@/]+@[^@/]+$")
    """Such as models:/demo@champion."""
    tracking_uri: str
    """MLflow's."""
    poll_seconds: float = Field(10, gt=0)
    """How often the alias is looked up."""
    batch: int = Field(16, ge=1)
    """Most images that the model is shown together."""
    wait_seconds: float = Field(0.01, ge=0)
    """How long an image waits for others."""


@serve.deployment
class Service:
    """One replica: a model, and a task that changes it where the alias has moved."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = MlflowClient(settings.tracking_uri)
        self.embedder = self._load(self._named())
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
        """The version that answered, and what it said, of each."""
        embedder = self.embedder  # one version for the batch, whatever becomes champion meanwhile
        answers = await asyncio.to_thread(embedder, contents)
        return [(embedder.identity.model, answer) for answer in answers]

    async def _follow(self) -> None:
        """Change to the version that the alias names. Whatever goes wrong, the one that is there goes on to answer."""
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            try:
                named = await asyncio.to_thread(self._named)
                if named != self.embedder.identity.model:
                    self.embedder = await asyncio.to_thread(self._load, named)
                    log.info("%s is %s now", self.settings.model, named)
            except Exception as error:  # a model can fail to load in any way
                log.warning("%s stays: %s", self.embedder.identity.model, error)

    def _named(self) -> str:
        """The version that the alias names."""
        name, alias = self.settings.model.removeprefix(SCHEME).split("@")
        return f"{SCHEME}{name}/{self.client.get_model_version_by_alias(name, alias).version}"

    def _load(self, version: str) -> Embedder:
        return Embedder(self.settings.tracking_uri, version)


def application(arguments: dict[str, Any]) -> serve.Application:
    """What `infra/serve/champion.yaml` names; its `args` are `Settings`."""
    bind = Service.bind  # type: ignore[attr-defined]  # the decorator makes a deployment of it
    return bind(Settings.model_validate(arguments))

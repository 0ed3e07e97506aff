"""HTTP requests for embeddings: who is answered, within which limits, and in which batches.

    POST /          an image file -> 200 with `model`, `embedding`, `class_id`, `class_name`, `score`,
                    or 400 with `model` and `error`, the reason why the file is no image
    GET /           -> 200 with `model`, the version that answers
    GET /healthz    -> 200; the only path that needs no token
    GET /metrics    -> 200 with counts in Prometheus' format

Other statuses have `error`: 401 or 403 without the right token, 404, 405, 408 for a body that takes too long, 413 for
one that is too large, 500 if the model fails, and 503 with `Retry-After` when there is more to do than limits allow.
"""

import asyncio
import hmac
import ipaddress
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from grainmill.corpus.embedder import Answer

log = logging.getLogger("ray.serve")
TOKEN = "GRAINMILL_SERVE_TOKEN"  # noqa: S105  # a name
"""Environment variable with the token that clients send as `Authorization: Bearer TOKEN`."""

Batch = Callable[[Sequence[bytes]], tuple[str, Sequence[Answer]]]
"""Embeds the contents of files, in a thread; returns the URI of the version and an answer for each."""


class Limits(BaseModel):
    """Limits of a replica."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    batch: int = Field(16, ge=1)
    """Largest number of images in a batch. A batch is what has arrived while the one before it was embedded."""
    queue: int = Field(64, ge=1)
    """Largest number of images that wait for a batch; those that come after get status 503."""
    image_bytes: int = Field(2**25, ge=1)
    """Largest size of an image file."""
    held_bytes: int = Field(2**28, ge=1)
    """Largest size of all images that are held at a time, whole and in part."""
    body_seconds: float = Field(10, gt=0)
    """Longest time in which a body must have arrived, in seconds."""
    answer_seconds: float = Field(30, gt=0)
    """Longest time from then to the answer, in seconds."""


class RefusalError(Exception):
    """A request is not answered with an embedding; the text is the reason."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


def _busy(reason: str) -> RefusalError:
    return RefusalError(503, f"{reason}; try again later", {"Retry-After": "1"})


class Queue:
    """Images that wait; whatever waits when a batch is done becomes the next batch, so that no time passes idle."""

    def __init__(self, embed: Batch, limits: Limits, sizes: Histogram) -> None:
        self._embed, self._limits, self._sizes = embed, limits, sizes
        self._waiting: deque[tuple[bytes, asyncio.Future[tuple[str, Answer]]]] = deque()
        self._thread = ThreadPoolExecutor(1, "embed")
        self._worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    async def embed(self, content: bytes) -> tuple[str, Answer]:
        """Return the version and the answer for a file. Raises RefusalError if the queue is full or it is late."""
        if len(self._waiting) >= self._limits.queue:
            raise _busy(f"{self._limits.queue} images wait already")
        place = content, asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            async with asyncio.timeout(self._limits.answer_seconds):
                return await place[1]
        except TimeoutError:
            raise _busy(f"no answer within {self._limits.answer_seconds:g} seconds") from None
        finally:
            if place in self._waiting:  # the client has gone
                self._waiting.remove(place)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            count = min(len(self._waiting), self._limits.batch)
            contents, futures = zip(*(self._waiting.popleft() for _ in range(count)), strict=True)
            self._sizes.observe(count)
            try:
                model, answers = await loop.run_in_executor(self._thread, self._embed, contents)
            except Exception as error:  # whatever the model raises is the answer to all of the batch
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
            else:
                for future, answer in zip(futures, answers, strict=True):
                    if not future.done():
                        future.set_result((model, answer))


class Endpoint:
    """Answers requests."""

    def __init__(self, embed: Batch, model: Callable[[], str], limits: Limits, token: str | None) -> None:
        """
        Args:
            model: returns the URI of the version that answers.
            token: what clients must send; without one, only clients on this machine are answered.
        """
        self._model, self._limits, self._token, self._held = model, limits, token, 0
        self._registry = CollectorRegistry()
        buckets = [2**power for power in range(limits.batch.bit_length() + 1)]
        sizes = Histogram("grainmill_batch_images", "Images in a batch", registry=self._registry, buckets=buckets)
        self._queue = Queue(embed, limits, sizes)
        self._requests = Counter("grainmill_requests", "Requests", ["status"], registry=self._registry)
        self._seconds = Histogram("grainmill_answer_seconds", "Time to an embedding", registry=self._registry)
        waiting = Gauge("grainmill_queue_images", "Images that wait for a batch", registry=self._registry)
        waiting.set_function(lambda: len(self._queue))
        held = Gauge("grainmill_held_bytes", "Bytes of images held", registry=self._registry)
        held.set_function(lambda: self._held)

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        try:
            response = await self._answer(request)
        except RefusalError as refusal:
            response = JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)
        except ClientDisconnect:
            response = Response(status_code=499)  # for the count; nobody reads it
        except Exception:  # a model can fail in any way
            log.exception("no answer to a request")
            response = JSONResponse({"error": "the model failed; the reason is in the server's log"}, 500)
        self._requests.labels(response.status_code).inc()
        return response

    async def _answer(self, request: Request) -> Response:
        path, method = request.url.path, request.method
        allowed = {"/": ("GET", "HEAD", "POST"), "/healthz": ("GET", "HEAD"), "/metrics": ("GET", "HEAD")}.get(path)
        if path == "/healthz" and method != "POST":
            return PlainTextResponse("ok")
        self._admit(request)
        if allowed is None:
            raise RefusalError(404, "the paths are /, /healthz and /metrics")
        if method not in allowed:
            raise RefusalError(405, f"the methods of {path} are {', '.join(allowed)}", {"Allow": ", ".join(allowed)})
        if path == "/metrics":
            return PlainTextResponse(generate_latest(self._registry))
        if method != "POST":
            return JSONResponse({"model": self._model()})
        started = perf_counter()
        parts: list[bytes] = []
        try:
            await self._read(request, parts)
            model, answer = await self._queue.embed(b"".join(parts))
        finally:
            self._held -= sum(map(len, parts))
        if answer.embedding is None:
            return JSONResponse({"model": model, "error": answer.error}, status_code=400)
        self._seconds.observe(perf_counter() - started)
        return JSONResponse({"model": model, **answer._asdict(), "embedding": answer.embedding.tolist()})

    def _admit(self, request: Request) -> None:
        """Raise RefusalError unless the client may ask."""
        if not self._token:
            if request.client is None or not _is_loopback(request.client.host):
                raise RefusalError(
                    403, f"clients on other machines need a token, but this server has none; set {TOKEN}"
                )
        elif not hmac.compare_digest(_bearer(request.headers), self._token.encode()):
            raise RefusalError(401, "send the token as `Authorization: Bearer TOKEN`", {"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request, parts: list[bytes]) -> None:
        """Append the parts of the body, and count them as held. Raises RefusalError at a limit, whatever is to come."""
        limits, size = self._limits, 0
        too_large = RefusalError(
            413, f"an image must have at most {limits.image_bytes:,} bytes", {"Connection": "close"}
        )
        if int(request.headers.get("content-length", 0)) > limits.image_bytes:
            raise too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > limits.image_bytes:
                        raise too_large
                    if self._held + len(part) > limits.held_bytes:
                        raise _busy("the images that are held fill the memory for them")
                    self._held += len(part)
                    parts.append(part)
        except TimeoutError:
            reason = f"a body must arrive within {limits.body_seconds:g} seconds"
            raise RefusalError(408, reason, {"Connection": "close"}) from None


def _bearer(headers: Headers) -> bytes:
    """Return the token that a client has sent; empty without one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback

"""Published weights of trunks, by torchvision and timm: from their caches, or downloaded."""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, TypeVar

from multigrain.config.training import TIMM

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = 2.5
"""Time after which a download must have ended, or its server must answer within as long again."""

Result = TypeVar("Result")


def zoo_problem(trunk_name: str) -> str | None:
    """Say that no weights of a trunk are published; None if there are some."""
    published = trunk_name != "narrow"
    if trunk_name.startswith(TIMM):
        import timm

        published = timm.is_model_pretrained(trunk_name.removeprefix(TIMM))
    if published:
        return None
    return (
        f"model.weights can be zoo where weights are published, but {trunk_name} has none; set it to random or a file"
    )


def published_weights(trunk_name: str) -> dict[str, "Tensor"]:
    """The state dict of the published classifier, from the library's cache or downloaded.

    Raises:
        ValueError: there are none, or they cannot be had.
    """
    import torchvision

    if problem := zoo_problem(trunk_name):
        raise ValueError(problem)
    try:
        if trunk_name.startswith(TIMM):
            import timm

            name = trunk_name.removeprefix(TIMM)
            published = timm.get_pretrained_cfg(name)
            server = os.environ.get("HF_ENDPOINT", "https://huggingface.co") if published.hf_hub_id else published.url
            # With its classifier: without it, timm would ignore other keys that differ.
            return _downloaded(server, lambda: timm.create_model(name, pretrained=True).state_dict())
        weights = torchvision.models.get_model_weights(trunk_name)["IMAGENET1K_V1"]
        options = {"progress": False, "check_hash": True, "map_location": "cpu", "weights_only": True}
        return _downloaded(weights.url, lambda: weights.get_state_dict(**options))
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"model.weights can be zoo where the published weights can be had, but those of {trunk_name} cannot "
            f"({error}); try again or name a file"
        ) from error


def _downloaded(server: str, download: Callable[[], dict[str, "Tensor"]]) -> dict[str, "Tensor"]:
    """Return what a download gives; give up after seconds if its server, the URL `server`, is out of reach.

    The libraries try for a minute.
    """
    result = _in_background(download)
    if not wait([result], SECONDS).done:
        answer = _in_background(lambda: _answers(server))  # the search for its address has no time limit
        if not wait([answer], SECONDS).done or not answer.result():
            raise OSError(f"{server} does not answer")
    return result.result()


def _in_background(call: Callable[[], Result]) -> "Future[Result]":
    """Run a call in a thread that the end of the process does not wait for."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True

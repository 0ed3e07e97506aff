"""A connection to a Ray cluster, or a local Ray that is started and stopped."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address

from grainmill.errors import ResourceError

OBJECT_STORE_BYTES = 256 * 2**20
"""Of a local Ray: trials pass metrics, not data."""


POLL_SECONDS = "0.5"
"""How often Ray Train takes up reports; a worker's report waits for it, two seconds by default."""


HEAD_SECONDS = 10
"""Within which the head of a connect must answer."""


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Ray at an address, or a local one that ends with the block; one that is there already is used and left.

    A local Ray keeps its dashboard: Ray Train asks it which groups are still alive.

    Raises:
        ResourceError: no connect answers there, or it does not take this process: other versions, no token.
    """
    if ray.is_initialized():
        yield
        return
    if address and "://" not in address:
        _check_head(address)
    environment = {"env_vars": {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL_SECONDS}}
    where: dict[str, Any] = {"address": address}
    if not address:
        where = {"address": "local", "include_dashboard": True, "object_store_memory": OBJECT_STORE_BYTES}
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**where, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    except (ConnectionError, RuntimeError, ValueError) as error:
        ray.shutdown()
        raise ResourceError(_refusal(address, error)) from error
    signal.signal(signal.SIGTERM, on_termination)  # Ray's own handler aborts the process where it stands
    try:
        yield
    finally:
        ray.shutdown()


def _check_head(address: str) -> None:
    """Refuse an address where no head answers: Ray tries for minutes, and may end this process then."""
    with suppress(ValueError):  # no address at all; Ray says what is wrong with it
        if place := canonicalize_bootstrap_address(address):
            with init_grpc_channel(place) as channel:
                try:
                    grpc.channel_ready_future(channel).result(timeout=HEAD_SECONDS)
                except grpc.FutureTimeoutError:
                    raise ResourceError(
                        f"the head of a Ray connect must answer at {place} within {HEAD_SECONDS} seconds, but did not; "
                        "is it running, and is this its own port (6379 by default), not that of its dashboard?"
                    ) from None


def _refusal(address: str | None, error: Exception) -> str:
    """Why Ray did not let us in, in words."""
    versions = re.findall(r"(?:Ray|Python): (\S+)", str(error))
    if "Version mismatch" in str(error) and len(versions) == 4:
        other_ray, other_python, our_ray, our_python = versions
        return (
            f"a connect must have the versions of this command, Ray {our_ray} and Python {our_python}, but the one at "
            f"{address} has Ray {other_ray} and Python {other_python}; install those here, or these there"
        )
    return f"Ray must let this command in at {address or 'this machine'}, but said: {error}; correct --address"

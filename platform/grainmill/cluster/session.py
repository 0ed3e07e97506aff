"""Connection to a Ray cluster, or to a local Ray that is started and stopped."""

import os
import re
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from grainmill.cluster import ray_private
from grainmill.errors import ResourceError

OBJECT_STORE_BYTES = 256 * 2**20
"""Size of a local Ray's object store: trials pass metrics, not data."""
POLL_SECONDS = "0.5"
"""Interval in seconds at which Ray Train collects reports (its default is 2); until then, the worker waits."""
HEAD_SECONDS = 5
"""Time in seconds within which the head of a cluster must answer."""
NODE_SECONDS = 5
"""Interval in seconds at which this process looks whether a local Ray is alive."""
AGAIN_SECONDS = 30
"""Pause in seconds before the main thread is interrupted again, should it have swallowed the first time."""


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Use the Ray cluster at an address, or start a local Ray for the block; an existing connection is used and kept.

    A local Ray keeps its dashboard: Ray Train asks it which groups are alive.

    Raises:
        ResourceError: no cluster answers, or it refuses this process because of other versions or a missing token; or
            a local Ray has died.
    """
    if ray.is_initialized():
        yield
        return
    check(address)
    environment = {"env_vars": {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": POLL_SECONDS}}
    where: dict[str, Any] = {"address": address}
    if not address:
        where = {"address": "local", "include_dashboard": True, "object_store_memory": OBJECT_STORE_BYTES}
        _keep_token_private()
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**where, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    except (ConnectionError, RuntimeError, ValueError) as error:
        ray.shutdown()
        raise ResourceError(_refusal(address, error)) from error
    signal.signal(signal.SIGTERM, on_termination)  # Ray's own handler aborts the process immediately
    try:
        with nullcontext() if address else _while_node_lives():
            yield
    finally:
        ray.shutdown()


class _NodeDiedError(BaseException):
    """The node of this process is dead. Passes whatever handles the errors of trials."""


@contextmanager
def _while_node_lives() -> Iterator[None]:
    """End the block when the local Ray loses its only node: whatever it waits for would never come.

    Raises:
        ResourceError: the node is dead.
    """
    main, dead, over = threading.main_thread(), threading.Event(), threading.Event()
    if threading.current_thread() is not main:  # only the main thread can be interrupted
        yield
        return

    def watch() -> None:
        while not over.wait(AGAIN_SECONDS if dead.is_set() else NODE_SECONDS):
            with suppress(RayError):
                if dead.is_set() or not any(node["Alive"] for node in ray.nodes()):
                    dead.set()
                    signal.pthread_kill(main.ident or 0, signal.SIGUSR2)

    def interrupt(*_: Any) -> None:
        if not over.is_set():
            raise _NodeDiedError

    before = signal.signal(signal.SIGUSR2, interrupt)
    threading.Thread(target=watch, name="node-watch", daemon=True).start()
    try:
        yield
    except BaseException:  # Ray may have turned ours into another
        if not dead.is_set():
            raise
        raise ResourceError(
            "the local Ray must run as long as the command, but its raylet process has died, maybe for lack of memory; "
            "the same command carries on"
        ) from None
    finally:
        over.set()
        signal.signal(signal.SIGUSR2, before)


def _keep_token_private() -> None:
    """Make the token of local Rays, or let its owner alone read it: Ray's own is readable for all users."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    token = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):  # Ray says what is wrong with the folder
        token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=token.parent) as draft, suppress(FileExistsError):
            draft.write(secrets.token_hex(32))
            draft.flush()
            os.link(draft.name, token)  # whole from the beginning, for others that start at the same time
        token.chmod(0o600)


def check(address: str | None) -> None:
    """Refuse an address where no head answers. Ray itself tries for minutes and may then end this process.

    Raises:
        ResourceError: no head answers, or the address is of another kind.
    """
    if not address:
        return
    if address.startswith("ray://"):
        raise ResourceError(
            f"--address must be HOST:PORT of a cluster's head, but {address} is that of a Ray Client server, which can "
            "start no trials; run this command on the cluster, or send it there with `grainmill submit`"
        )
    with suppress(ValueError):  # not an address; Ray says what is wrong with it
        try:
            resolved, answers = ray_private.head_answers(address, HEAD_SECONDS)
        except ConnectionError:
            raise ResourceError(
                f"--address {address} needs a Ray that runs on this machine, but there is none; start it with "
                "`ray start --head`, name another, or leave --address out for a local Ray"
            ) from None
        if not answers:
            raise ResourceError(
                f"the head of a Ray cluster must answer at {resolved} within {HEAD_SECONDS} seconds, but did not; "
                "is it running, and is this its own port (6379 by default), not that of its dashboard?"
            )


def _refusal(address: str | None, error: Exception) -> str:
    """Reword Ray's reason for refusing the connection."""
    versions = re.findall(r"(?:Ray|Python): (\S+)", str(error))
    if "Version mismatch" in str(error) and len(versions) == 4:
        other_ray, other_python, our_ray, our_python = versions
        return (
            f"a cluster must have the versions of this command, Ray {our_ray} and Python {our_python}, but the one at "
            f"{address} has Ray {other_ray} and Python {other_python}; install those here, or these there"
        )
    return f"Ray must let this command in at {address or 'this machine'}, but said: {error}; correct --address"

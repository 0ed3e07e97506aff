"""A lock for a folder in S3, so that one process at a time works there: an object that its holder renews.

Only the renewals show that a holder is alive. A lock that a dead process left is taken over by a conditional write. So
of several processes that try, one gets the lock, and a holder that was only slow learns that it lost the lock.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from uuid import uuid4

from grainmill.errors import BusyError, StorageError
from grainmill.storage import s3
from grainmill.storage.s3 import S3Object, S3Prefix

NAME = ".lease"
"""Name of the object."""
EXPIRES_SECONDS = 60.0
"""Time without a renewal after which a holder counts as dead."""
RENEW_SECONDS = 15.0
POLL_SECONDS = 1.0


class Lock:
    """The lock of one folder, seen by one process."""

    def __init__(self, store: S3Prefix) -> None:
        self._store, self._renewals, self._until = store, 0, 0.0
        self._etag: str | None = None
        self._holder = {"host": socket.gethostname(), "pid": os.getpid(), "token": str(uuid4())}
        self._one_at_a_time = threading.Lock()

    def renew(self, store: S3Prefix | None = None) -> bool:
        """Write the lock again; return False if another process has taken it."""
        with self._one_at_a_time:
            began = time.monotonic()
            body = json.dumps(self._holder | {"beats": self._renewals}).encode()
            etag = (store or self._store).put(NAME, body, self._etag)
            if etag is not None:
                self._etag, self._renewals, self._until = etag, self._renewals + 1, began + EXPIRES_SECONDS
            return etag is not None

    def take(self, left: S3Object | None) -> bool:
        """Take the lock in place of what a dead process left; return False if another process was faster."""
        self._etag = left and left.etag
        return self.renew()

    def check(self) -> None:
        """Make sure that this process still holds the lock; an expired lock is renewed.

        Raises:
            BusyError: another process has taken the lock.
        """
        if time.monotonic() > self._until and not self.renew():
            raise BusyError(
                f"one process at a time works in {self._store.url}, but while this one gave no sign of life for "
                f"{EXPIRES_SECONDS:g} seconds, another took its place: {_holder(self._store.get(NAME))}"
            )

    def expire(self) -> None:
        """Make the next `check` ask who holds the lock."""
        self._until = 0.0

    def release(self) -> None:
        """Delete the lock if this process holds it."""
        store = self._store.impatient()
        found = store.get(NAME)
        if found and found.etag == self._etag:
            store.delete(NAME)


@contextmanager
def hold(url: str, what: str, notify: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold the lock of a folder during the block; yields a function that raises BusyError once the lock is lost.

    Args:
        url: URL of the folder.
        what: description of the work, for messages.
        notify: receives a message if this must wait to learn whether the holder is dead.
    Raises:
        BusyError: another process holds the lock.
        StorageError: the bucket does not exist, or cannot be written.
    """
    with s3.opened(url) as patient:
        store, lock = patient.impatient(), Lock(patient)
        _probe(store)
        while not lock.take(_wait_for_dead(store, what, notify)):
            pass
        over = threading.Event()

        def renew() -> None:
            while not over.wait(RENEW_SECONDS):
                with suppress(StorageError):
                    if not lock.renew(store):
                        return lock.expire()
            return None

        thread = threading.Thread(target=renew, name="lock", daemon=True)
        thread.start()
        try:
            yield lock.check
        finally:
            over.set()
            thread.join()
            with suppress(StorageError):  # the lock expires by itself
                lock.release()


def _wait_for_dead(store: S3Prefix, what: str, notify: Callable[[str], None]) -> S3Object | None:
    """Wait until the holder is surely dead and return the lock it left; None if nothing holds the lock."""
    began, before = time.monotonic(), store.get(NAME)
    found = before
    while found and found.age < EXPIRES_SECONDS and time.monotonic() - began < EXPIRES_SECONDS:
        assert before, "the lock was there at first"
        if found.etag != before.etag:
            raise BusyError(
                f"one process at a time works under a name, but another has {what} in {store.url}: {_holder(found)}; "
                "wait for it, or choose another name"
            )
        if found is before:
            wait = EXPIRES_SECONDS - found.age
            notify(f"{what} was left by {_holder(found)}; waiting up to {wait:.0f} seconds whether that still lives")
        time.sleep(POLL_SECONDS)
        found = store.get(NAME)
    return found


def _holder(found: S3Object | None) -> str:
    if found is None:
        return "one that has ended"
    holder = json.loads(found.body)
    return f"process {holder['pid']} on {holder['host']}, alive {found.age:.0f} seconds ago"


def _probe(store: S3Prefix) -> None:
    """Write, read and delete an object, so that missing rights show before the work begins."""
    name = f".probe-{uuid4()}"
    store.put(name, b"", None)
    store.get(name)
    store.delete(name)

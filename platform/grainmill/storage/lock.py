"""One process at a time works in a folder of S3: its lock is an object that the holder renews.

Whether a holder is alive shows in its renewals alone. What a dead one has left is taken over as it was last written, so
of several that try one gets it, and a holder that was only slow finds out.
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

LEASE = ".lease"
EXPIRES_SECONDS = 60.0
"""Without a renewal, after which a holder counts as dead."""
RENEW_SECONDS = 15.0
POLL_SECONDS = 1.0


class Tenure:
    """The right to work in a folder."""

    def __init__(self, store: S3Prefix) -> None:
        self._store, self._beats, self._until = store, 0, 0.0
        self._etag: str | None = None
        self._who = {"host": socket.gethostname(), "pid": os.getpid(), "token": str(uuid4())}
        self._one_at_a_time = threading.Lock()

    def renew(self, store: S3Prefix | None = None) -> bool:
        """Put it off that others take us for dead; whether nobody has done so."""
        with self._one_at_a_time:
            began = time.monotonic()
            body = json.dumps(self._who | {"beats": self._beats}).encode()
            etag = (store or self._store).put(LEASE, body, self._etag)
            if etag is not None:
                self._etag, self._beats, self._until = etag, self._beats + 1, began + EXPIRES_SECONDS
            return etag is not None

    def take(self, left: S3Object | None) -> bool:
        """Begin, in place of what a dead process has left; whether nobody was faster."""
        self._etag = left and left.etag
        return self.renew()

    def check(self) -> None:
        """Make sure that nobody has taken it over, and renew it if need be.

        Raises:
            BusyError: somebody has.
        """
        if time.monotonic() > self._until and not self.renew():
            raise BusyError(
                f"one process at a time works in {self._store.url}, but while this one gave no sign of life for "
                f"{EXPIRES_SECONDS:g} seconds, another took its place: {_holder(self._store.get(LEASE))}"
            )

    def lapse(self) -> None:
        """It is somebody else's."""
        self._until = 0.0

    def give_back(self) -> None:
        """Let others in at once, if it is ours."""
        store = self._store.impatient()
        found = store.get(LEASE)
        if found and found.etag == self._etag:
            store.delete(LEASE)


@contextmanager
def held(url: str, what: str, note: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """The only process in a folder, for the time of the block; yields what raises BusyError if it is not any more.

    Args:
        url: of the folder.
        what: that is worked on, in words.
        note: is told if it takes a while to find out whether the holder is dead.
    Raises:
        BusyError: another process works there.
        StorageError: the bucket does not exist, or cannot be written.
    """
    with s3.opened(url) as patient:
        store, tenure = patient.impatient(), Tenure(patient)
        _probe(store)
        while not tenure.take(_left(store, what, note)):
            pass
        over = threading.Event()

        def renew() -> None:
            while not over.wait(RENEW_SECONDS):
                with suppress(StorageError):
                    if not tenure.renew(store):
                        return tenure.lapse()
            return None

        thread = threading.Thread(target=renew, name="tenure", daemon=True)
        thread.start()
        try:
            yield tenure.check
        finally:
            over.set()
            thread.join()
            with suppress(StorageError):  # it expires by itself
                tenure.give_back()


def _left(store: S3Prefix, what: str, note: Callable[[str], None]) -> S3Object | None:
    """What a dead holder has left, None if there is no holder; waits until that is sure."""
    began, before = time.monotonic(), store.get(LEASE)
    found = before
    while found and found.age < EXPIRES_SECONDS and time.monotonic() - began < EXPIRES_SECONDS:
        assert before, "it was there at first"
        if found.etag != before.etag:
            raise BusyError(
                f"one process at a time works under a name, but another has {what} in {store.url}: {_holder(found)}; "
                "wait for it, or choose another name"
            )
        if found is before:
            wait = EXPIRES_SECONDS - found.age
            note(f"{what} was left by {_holder(found)}; waiting up to {wait:.0f} seconds whether that still lives")
        time.sleep(POLL_SECONDS)
        found = store.get(LEASE)
    return found


def _holder(found: S3Object | None) -> str:
    if found is None:
        return "one that has ended"
    who = json.loads(found.body)
    return f"process {who['pid']} on {who['host']}, alive {found.age:.0f} seconds ago"


def _probe(store: S3Prefix) -> None:
    """Make sure that objects can be written, read and deleted, before anything begins."""
    name = f".probe-{uuid4()}"
    store.put(name, b"", None)
    store.get(name)
    store.delete(name)

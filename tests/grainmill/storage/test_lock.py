"""One process at a time in a folder of S3."""

import json
import os
import socket
import subprocess
import sys

import pytest
from s3_servers import failing

from grainmill.errors import BusyError, StorageError
from grainmill.storage import lock, s3
from grainmill.storage.lock import hold

pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def url(place, monkeypatch):
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    return place


@pytest.fixture
def dead(monkeypatch):
    """Who gives no sign of life is dead at once."""
    monkeypatch.setattr(lock, "EXPIRES_SECONDS", 0.0)


def test_it_can_be_taken_again_when_it_was_given_back(url, bucket):
    notes = []
    for _ in range(2):
        with hold(url, "it", notes.append) as check:
            (lease,) = bucket.objects()
            assert lease["Key"].endswith(lock.NAME)
            check()
        assert bucket.objects() == notes == []


def test_a_second_process_is_refused_naming_the_first(url, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    notes = []
    with hold(url, "'demo'", notes.append) as check:
        with pytest.raises(BusyError) as caught, hold(url, "'demo'", notes.append):
            pass
        check()
    parts = [f"process {os.getpid()} on {socket.gethostname()}, alive 0 seconds ago", "'demo'", url, "wait for it"]
    assert [part for part in parts if part not in str(caught.value)] == []
    assert len(notes) == 1
    assert "waiting up to 60 seconds" in notes[0] or "waiting up to 59 seconds" in notes[0]


KILLED = """
import os, sys
from grainmill.storage import lock
with lock.hold(sys.argv[1], "it", print):
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_holds_is_taken_over(url, dead):
    subprocess.run([sys.executable, "-c", KILLED, url], check=False)
    with s3.opened(url) as store:
        left = json.loads(store.get(lock.NAME).body)
        assert left["pid"] != os.getpid()
        with hold(url, "it", print):
            assert json.loads(store.get(lock.NAME).body)["pid"] == os.getpid()


def test_a_holder_that_was_only_slow_finds_out_and_leaves_the_other_alone(url, dead, bucket):
    with hold(url, "it", print) as check:
        check()  # expired, but still the only one
        with hold(url, "it", print) as check_other:
            with pytest.raises(BusyError, match=rf"another took its place: process {os.getpid()} on"):
                check()
            check_other()
    assert bucket.objects() == []


def test_a_holder_that_lost_it_does_not_give_back_what_another_holds(url, dead):
    with s3.opened(url) as store, hold(url, "it", print):
        slow = lock.Lock(store)
        slow.take(store.get(lock.NAME))
        with hold(url, "it", print):
            slow.release()
            assert store.get(lock.NAME) is not None


def test_an_outage_that_is_longer_than_a_lease_is_sat_out(url, dead, door):
    left = [12]

    def rule(method, *_):
        if method == "PUT" and left[0]:
            left[0] -= 1
            return (503, "SlowDown")
        return None

    with hold(url, "it", print) as check:
        door.rule = rule
        check()
    assert left == [0]


def test_a_renewal_whose_answer_was_lost_counts(url, dead, door):
    with hold(url, "it", print) as check:
        door.rule = failing(1, "lost")
        check()
        check()


@pytest.mark.parametrize(
    ("method", "fault", "told"),
    [
        ("PUT", (403, "AccessDenied"), "access is denied; allow .*s3:PutObject"),
        ("DELETE", (403, "AccessDenied"), "access is denied; allow .*s3:DeleteObject"),
        ("GET", (403, "AccessDenied"), "access is denied; allow .*s3:GetObject"),
        ("PUT", (400, "ExpiredToken"), "have expired"),
        ("PUT", (503, "SlowDown"), "answers SlowDown"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_refused_at_the_start(url, door, method, fault, told):
    door.rule = lambda sent, *_: fault if sent == method else None
    with pytest.raises(StorageError, match=told) as caught, hold(url, "it", print):
        pass
    assert url in str(caught.value)
    door.rule = lambda *_: None


def test_a_bucket_that_is_not_there_is_refused_at_the_start(url):
    with pytest.raises(StorageError, match="none of that name"), hold("s3://nowhere/runs/x", "it", print):
        pass

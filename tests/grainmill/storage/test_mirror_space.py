"""Room on the disk for mirrors: what goes for others, what stays because it is read, and what cannot be."""

import fcntl
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from s3_servers import files

from grainmill.errors import SourceError
from grainmill.storage import mirror_space
from grainmill.storage.mirror import Mirror

KB = 1e-6
"""In GB."""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Each test begins as a process that holds nothing; `forget` ends one."""
    monkeypatch.setattr(mirror_space, "_held", {})
    yield
    forget()


def forget():
    for lock in mirror_space._held.values():
        mirror_space.os.close(lock)
    mirror_space._held.clear()


@pytest.fixture
def sets(bucket):
    """Three sets of 4,000 bytes."""
    bucket.put(**{f"{name}/{number}.png": name.encode() * 2000 for name in "abc" for number in range(2)})
    return SimpleNamespace(**vars(bucket), url=lambda name: f"s3://{bucket.name}/{name}")


READER = """
import pathlib, sys
from grainmill.storage.mirror import Mirror
Mirror(pathlib.Path(sys.argv[2])).fetch(sys.argv[1])
print("read", flush=True)
sys.stdin.read()
"""


def reader(source, folder):
    """A process that reads a source until it is killed."""
    command = [sys.executable, "-c", READER, source, str(folder)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "read\n"
    return child


def kill(child):
    child.kill()
    child.communicate()


def there(folder, bucket):
    return {name.split("/")[0] for name in files(folder / bucket.name)}


def asked_for(folder, *names):
    """Make it that the sets were asked for in this order, the first longest ago."""
    for use in folder.glob(".s3/*/uses/*"):
        (prefix,) = mirror_space._prefixes(use)
        mirror_space.os.utime(use, (names.index(prefix[0]),) * 2)


def test_what_was_used_last_is_evicted_last(sets, tmp_path):
    for name in "abc":
        Mirror(tmp_path).fetch(sets.url(name))
        forget()
    asked_for(tmp_path, "b", "a", "c")
    sets.put(**{"d/1.png": b"d" * 3000})
    room = Mirror(tmp_path, 12 * KB)  # 12,000 bytes are there
    room.fetch(sets.url("d"))
    assert there(tmp_path, sets) == {"a", "c", "d"}
    room.fetch(sets.url("b"))
    assert there(tmp_path, sets) == {"b", "c", "d"}


def test_what_is_there_needs_no_room(sets, tmp_path):
    Mirror(tmp_path).fetch(sets.url("a"))
    forget()
    Mirror(tmp_path, 1 * KB).fetch(sets.url("a"))
    assert there(tmp_path, sets) == {"a"}


def test_another_bucket_makes_room_too(sets, tmp_path, moto):
    name = sets.name.replace("bucket", "other")
    moto.client.create_bucket(Bucket=name)
    moto.client.put_object(Bucket=name, Key="x/1.png", Body=b"x" * 4000)
    Mirror(tmp_path).fetch(f"s3://{name}/x")
    forget()
    Mirror(tmp_path, 7 * KB).fetch(sets.url("a"))
    assert set(files(tmp_path / sets.name)) == {"a/0.png", "a/1.png"}
    assert not (tmp_path / name).exists()


def test_a_set_within_another_does_not_take_it_along(sets, tmp_path):
    sets.put(**{"a/deep/1.png": b"x" * 100})
    Mirror(tmp_path).fetch(sets.url("a"))
    forget()
    Mirror(tmp_path).fetch(sets.url("a/deep"))
    Mirror(tmp_path, 7 * KB).fetch(sets.url("b"))
    assert set(files(tmp_path / sets.name)) == {"a/deep/1.png", "b/0.png", "b/1.png"}


def test_a_living_process_keeps_what_it_reads_and_a_killed_one_does_not(sets, tmp_path):
    child = reader(sets.url("a"), tmp_path)
    with pytest.raises(SourceError) as caught:
        Mirror(tmp_path, 7 * KB).fetch(sets.url("b"))
    assert "needs 0.00 GB free" in str(caught.value)
    assert "beside what is in use; raise `cache_limit`, or name another folder in `cache`" in str(caught.value)
    assert there(tmp_path, sets) == {"a"}
    kill(child)
    Mirror(tmp_path, 7 * KB).fetch(sets.url("b"))
    assert there(tmp_path, sets) == {"b"}


def test_a_process_keeps_what_it_reads_itself(sets, tmp_path):
    Mirror(tmp_path).fetch(sets.url("a"))
    with pytest.raises(SourceError, match="beside what is in use"):
        Mirror(tmp_path, 7 * KB).fetch(sets.url("b"))
    assert there(tmp_path, sets) == {"a"}


def test_a_set_that_is_larger_than_the_limit_is_refused_before_anything_goes(sets, tmp_path, proxy):
    sets.put(large=b"x" * 20_000_000)
    Mirror(tmp_path).fetch(sets.url("a"))
    forget()
    proxy.seen.clear()
    with pytest.raises(SourceError) as caught:
        Mirror(tmp_path, 0.01).fetch(f"s3://{sets.name}")
    (problem,) = caught.value.args
    told = (
        f"s3://{sets.name} has 0.02 GB, but mirrors in {tmp_path} may have 0.01; raise `cache_limit`, or name another"
    )
    assert problem.startswith(told)
    assert (proxy.got(), there(tmp_path, sets)) == ({}, {"a"})


def test_half_of_the_disk_is_the_limit_by_default(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror_space.shutil, "disk_usage", lambda _: SimpleNamespace(total=7999, free=7999))
    with pytest.raises(SourceError, match="GB, but mirrors in"):
        Mirror(tmp_path).fetch(sets.url("a"))
    monkeypatch.setattr(mirror_space.shutil, "disk_usage", lambda _: SimpleNamespace(total=8000, free=8000))
    assert Mirror(tmp_path).fetch(sets.url("a")).is_dir()


def test_a_full_disk_makes_mirrors_go_whatever_the_limit(sets, tmp_path, monkeypatch):
    Mirror(tmp_path).fetch(sets.url("a"))
    forget()
    free = lambda: 3000 if "a" in there(tmp_path, sets) else 7000  # noqa: E731
    monkeypatch.setattr(mirror_space.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=free()))
    Mirror(tmp_path).fetch(sets.url("b"))
    assert there(tmp_path, sets) == {"b"}


def test_a_mirror_that_is_being_filled_counts_whole_and_is_left_alone(sets, tmp_path):
    books = tmp_path / ".s3" / "busy"
    (books / "uses").mkdir(parents=True)
    (books / "booked").write_text("6000")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "1.png").write_bytes(b"x" * 1000)
    with (books / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match="beside what is in use"):
            Mirror(tmp_path, 9 * KB).fetch(sets.url("a"))
        assert (tmp_path / "busy" / "1.png").exists()
    Mirror(tmp_path, 4 * KB).fetch(sets.url("a"))
    assert not (tmp_path / "busy").exists(), "nobody asked for it"


def test_a_mirror_does_not_change_while_others_read_it(sets, tmp_path):
    before = files(Mirror(tmp_path).fetch(sets.url("a")), Path.read_bytes)
    child = reader(sets.url("a"), tmp_path)
    sets.put(**{"b/0.png": b"new", "a/2.png": b"new"})
    Mirror(tmp_path).fetch(sets.url("b"))
    Mirror(tmp_path).fetch(sets.url("a"))  # more is no change
    for change in (lambda: sets.put(**{"a/0.png": b"new"}), lambda: sets.delete("a/0.png")):
        change()
        for source in ("a", ""):
            with pytest.raises(
                SourceError, match="must not change while other processes of this machine read its mirror"
            ):
                Mirror(tmp_path).fetch(f"s3://{sets.name}/{source}")
    assert files(tmp_path / sets.name / "a", Path.read_bytes) == before | {"2.png": b"new"}
    kill(child)
    Mirror(tmp_path).fetch(sets.url("a"))
    assert set(files(tmp_path / sets.name / "a")) == {"1.png", "2.png"}


def test_a_single_object_keeps_nothing_but_itself(sets, tmp_path):
    sets.put(**{"list.csv": b"x" * 100})
    Mirror(tmp_path).fetch(sets.url("a"))
    forget()
    Mirror(tmp_path).fetch_objects({sets.url("list.csv"): None})
    Mirror(tmp_path, 7 * KB).fetch(sets.url("b"))
    assert there(tmp_path, sets) == {"b", "list.csv"}


def test_single_objects_of_some_folders_are_evicted_together(sets, tmp_path):
    Mirror(tmp_path).fetch_objects(dict.fromkeys((sets.url("a/0.png"), sets.url("b/1.png"))))
    assert set(files(tmp_path / sets.name)) == {"a/0.png", "b/1.png"}
    forget()
    Mirror(tmp_path, 4 * KB).fetch(sets.url("c"))
    assert there(tmp_path, sets) == {"c"}

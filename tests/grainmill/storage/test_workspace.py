"""Folders in S3, against a server of S3 behind a door that slams."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from s3_servers import SECRET, failing, files, seen_by_another

from grainmill.errors import StorageError
from grainmill.storage import s3, workspace


def write(folder, **texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


STEP_1 = {"step-1/model": "one", "step-1/MANIFEST.json": "{}"}
STEP_2 = {"step-2/model": "two", "step-2/state": "2", "step-2/MANIFEST.json": "{}"}


def replace_step(folder):
    """As a training does: the new one, then the old one goes; and a file that is written anew."""
    write(folder, **STEP_2)
    for name in STEP_1:
        (folder / name).unlink()


def test_a_folder_that_all_nodes_see_is_used_as_it_is(tmp_path):
    with workspace.opened(str(tmp_path)) as kept, kept.uploading():
        assert kept.path == tmp_path
        kept.upload()
    assert workspace.absolute("here") == str(Path.cwd() / "here")
    assert workspace.uri("/a b") == "file:///a%20b"
    assert workspace.uri("s3://b/c/") == "s3://b/c"


def test_what_is_pushed_is_what_another_process_finds(place):
    assert seen_by_another(place) == {}
    with workspace.opened(place) as kept:
        write(kept.path, **STEP_1, **{"deep/er/file": "x"})
        kept.upload()
        assert seen_by_another(place) == {**STEP_1, "deep/er/file": "x"}
        replace_step(kept.path)
        write(kept.path, **{"deep/er/file": "other"})
        kept.upload()
    assert seen_by_another(place) == {**STEP_2, "deep/er/file": "other"}


def test_only_what_changed_is_written_and_nothing_by_those_that_change_nothing(place, door):
    with workspace.opened(place) as kept:
        write(kept.path, a="1", b="2")
        kept.upload()
    with workspace.opened(place) as kept:
        door.seen.clear()
        kept.upload()
        assert door.seen == []
        write(kept.path, b="3")
        kept.upload()
        assert [(method, key.rpartition("/")[2]) for method, key in door.wrote()] == [
            ("PUT", "b"),
            ("PUT", workspace.INDEX),
        ]


def test_drafts_and_folders_of_others_are_no_part_of_it(place, bucket):
    bucket.put(**{"runs/trial-0001/trials/x/model": b"other", "runs/trial-0001/.lease": b"lease"})
    with workspace.opened(place, ["trials"]) as kept:
        assert files(kept.path) == {}
        write(kept.path, **{".hidden": "", "draft-step-1/model": "", "file.draft": "", "trials/y": "", "a": "1"})
        kept.upload()
        write(kept.path, a="2")
        kept.upload()
    listed = {one["Key"].removeprefix("runs/trial-0001/") for one in bucket.objects()}
    assert listed == {workspace.INDEX, "a", "trials/x/model", ".lease"}


def test_a_folder_that_was_copied_there_is_taken_as_it_lies(place, bucket):
    bucket.put(**{f"runs/trial-0001/{name}": text.encode() for name, text in STEP_1.items()})
    with workspace.opened(place) as kept:
        assert files(kept.path) == STEP_1
        replace_step(kept.path)
        kept.upload()
    assert seen_by_another(place) == STEP_2


def test_a_process_that_dies_at_any_request_leaves_the_old_or_the_new(place, door, monkeypatch):
    monkeypatch.setattr(s3, "PATIENCE", 0)
    both = [STEP_1, STEP_2]
    with workspace.opened(place) as kept:
        write(kept.path, **STEP_1)
        kept.upload()
    found = []
    for last in range(20):
        with workspace.opened(place) as kept:
            if files(kept.path) == STEP_2:
                break
            replace_step(kept.path)
            door.seen.clear()
            door.rule = lambda *_: "cut" if len(door.wrote()) >= last else None  # noqa: B023
            with suppress(StorageError):
                kept.upload()
        door.rule = lambda *_: None
        found.append(seen_by_another(place))
        assert found[-1] in both, last
        if found[-1] == STEP_2:
            break
    assert len(found) > len(STEP_2), "it died before each file and before the index"


def test_leftovers_of_a_process_that_died_go_with_the_next_push(place, door, bucket, monkeypatch):
    monkeypatch.setattr(s3, "PATIENCE", 0)
    with workspace.opened(place) as kept:
        write(kept.path, **STEP_1)
        kept.upload()
        write(kept.path, **STEP_2)
        door.rule = lambda _, key, __: "cut" if key.endswith(workspace.INDEX) else None
        with pytest.raises(StorageError):
            kept.upload()
    door.rule = lambda *_: None
    assert seen_by_another(place) == STEP_1
    with workspace.opened(place) as kept:
        write(kept.path, new="x")
        kept.upload()
    listed = {one["Key"].removeprefix("runs/trial-0001/") for one in bucket.objects()}
    assert listed == {workspace.INDEX, "new", *STEP_1}


def test_of_two_processes_that_write_each_leaves_its_own_state_whole(place):
    with workspace.opened(place) as slow, workspace.opened(place) as quick:
        write(slow.path, **STEP_1)
        write(quick.path, **STEP_2)
        for kept, state in [(slow, STEP_1), (quick, STEP_2), (slow, {**STEP_1, "a": "1"})]:
            write(kept.path, **{name: text for name, text in state.items() if name == "a"})
            kept._known = {} if kept is slow and "a" not in state else kept._known
            kept.upload()
            assert seen_by_another(place) == state


def test_an_index_that_somebody_deleted_is_written_anew(place, bucket):
    with workspace.opened(place) as kept:
        write(kept.path, **STEP_1)
        kept.upload()
        bucket.delete(f"runs/trial-0001/{workspace.INDEX}")
        replace_step(kept.path)
        kept.upload()
    assert seen_by_another(place) == STEP_2


# --- what goes wrong on the way


@pytest.mark.parametrize("fault", [(503, "SlowDown"), (500, "InternalError"), "cut", "lost"])
@pytest.mark.parametrize("key", ["step-1/model", workspace.INDEX])
def test_an_outage_is_sat_out(place, door, fault, key):
    door.rule = failing(12, fault, key=key)  # more often than botocore asks by itself
    with workspace.opened(place) as kept:
        write(kept.path, **STEP_1)
        kept.upload()
        write(kept.path, **STEP_2)
        kept.upload()
    assert seen_by_another(place) == {**STEP_1, **STEP_2}


def test_an_outage_at_the_start_is_sat_out_too(place, door):
    with workspace.opened(place) as kept:
        write(kept.path, **STEP_1)
        kept.upload()
    door.rule = failing(12, (503, "SlowDown"), of="GET")
    assert seen_by_another(place) == STEP_1


def test_an_outage_without_an_end_is_told_with_the_object(place, door, monkeypatch):
    monkeypatch.setattr(s3, "PATIENCE", 0.2)
    with workspace.opened(place) as kept:
        write(kept.path, **STEP_1)
        door.rule = lambda method, *_: (503, "SlowDown") if method == "PUT" else None
        with pytest.raises(StorageError, match=rf"{place}/.* answers SlowDown; try again later"):
            kept.upload()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ((400, "ExpiredToken"), "have expired; renew them"),
        ((403, "AccessDenied"), "access is denied; allow s3:ListBucket, s3:GetObject, s3:PutObject"),
        ((403, "InvalidAccessKeyId"), "refuses these"),
    ],
)
def test_what_no_patience_heals_is_told_at_once(place, door, fault, told):
    with workspace.opened(place) as kept:
        write(kept.path, **STEP_1)
        door.rule = lambda method, *_: fault if method == "PUT" else None
        door.seen.clear()
        with pytest.raises(StorageError, match=told) as caught:
            kept.upload()
        assert len(door.seen) == 1
        assert place in str(caught.value)
        assert SECRET not in str(caught.value)


def test_parts_of_a_large_file_that_fails_are_taken_back(place, door, bucket, moto, monkeypatch):
    monkeypatch.setattr(s3, "PATIENCE", 0)
    with workspace.opened(place) as kept:
        (kept.path / "large").write_bytes(bytes(20 * 2**20))
        door.rule = lambda _, __, query: (400, "BadDigest") if "partNumber=2" in query else None
        with pytest.raises(StorageError, match=f"{place}/large"):
            kept.upload()
        assert "Uploads" not in moto.client.list_multipart_uploads(Bucket=bucket.name)
        door.rule = lambda *_: None
        kept.upload()
    with workspace.opened(place) as kept:
        assert (kept.path / "large").read_bytes() == bytes(20 * 2**20)


def test_an_object_that_is_missing_is_named(place, bucket):
    with workspace.opened(place) as kept:
        write(kept.path, **STEP_1)
        kept.upload()
    bucket.delete("runs/trial-0001/step-1/model")
    with pytest.raises(StorageError, match="lacks step-1/model; put it back"):
        seen_by_another(place)


def test_a_disk_that_is_too_small_is_told_with_its_folder(place, monkeypatch, tmp_path):
    with workspace.opened(place) as kept:
        write(kept.path, **STEP_1)
        kept.upload()
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda _: SimpleNamespace(free=2))
    copies = tmp_path / "work"
    with pytest.raises(StorageError, match=rf"needs 0.00 GB free in {copies}/\S+, got 0.00"):
        seen_by_another(place)


def test_what_appears_meanwhile_is_pushed_without_being_asked(place, door, monkeypatch):
    monkeypatch.setattr(workspace, "POLL_SECONDS", 0.01)
    there = threading.Event()

    def rule(method, key, _):
        if method == "DELETE":
            there.set()

    with workspace.opened(place) as kept, kept.uploading():
        write(kept.path, **STEP_1)
        kept.upload()
        door.rule = rule
        replace_step(kept.path)
        assert there.wait(30)
        assert seen_by_another(place).items() >= STEP_2.items()


def test_what_a_block_leaves_when_it_is_cut_short_is_pushed(place, monkeypatch):
    monkeypatch.setattr(workspace, "POLL_SECONDS", 1000)

    def block():
        with workspace.opened(place) as kept, kept.uploading():
            write(kept.path, **STEP_1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert seen_by_another(place) == STEP_1


HOLDER = """
import sys
from grainmill.storage import workspace
workspace.WORK = sys.argv[2]
with workspace.opened(sys.argv[1]) as kept:
    print(kept.path, flush=True)
    sys.stdin.read()
"""


def test_copies_of_processes_that_died_are_cleared_away_and_no_others(place, tmp_path):
    command = [sys.executable, "-c", HOLDER, place, str(tmp_path / "work")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        left = Path(other.stdout.readline().strip())
        with workspace.opened(place) as kept:
            assert left.is_dir()
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
            with workspace.opened(place):
                assert not left.exists()
                assert kept.path.is_dir()
    assert [path.name for path in (tmp_path / "work").iterdir()] == [".lock"]
    with (tmp_path / "work" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_one_file_is_read_by_itself(place, tmp_path):
    write(tmp_path, file="text")
    assert workspace.read(str(tmp_path), "file") == "text"
    assert workspace.read(str(tmp_path), "other") is workspace.read(f"{tmp_path}/file", "x") is None
    with workspace.opened(place) as kept:
        write(kept.path, file=json.dumps("ä"))
        kept.upload()
    assert workspace.read(place, "file") == json.dumps("ä")
    assert workspace.read(place, "other") is None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("s3://", "must be s3://bucket/prefix"),
        ("s3://b@d:x/y", "credentials belong in AWS_ACCESS_KEY_ID"),
        ("s3://bucket/a/../b", "must be a plain path"),
        ("gs://bucket", "must be a folder or s3://bucket/prefix, got one that begins with gs://"),
    ],
)
def test_names_of_no_place_are_told(name, told):
    assert told in workspace.problem(name)
    assert workspace.problem("s3://bucket/a/") is workspace.problem("a/b") is workspace.problem("/a") is None


FOREIGN = ["/tmp/x", "../x", "a/../../x", "a//x", "a\\x", "a/./x"]


@pytest.mark.parametrize("indexed", [True, False], ids=["with an index", "without"])
@pytest.mark.parametrize("name", FOREIGN, ids=ascii)
def test_no_name_in_a_bucket_becomes_a_file_outside_the_copy(place, bucket, tmp_path, name, indexed):
    name = str(tmp_path / "x") if name == "/tmp/x" else name
    bucket.put(**{f"runs/trial-0001/{name}": b"foreign", "runs/trial-0001/good": b"good"})
    if indexed:
        index = json.dumps({"files": ["good", name], "writer": "x"}).encode()
        bucket.put(**{f"runs/trial-0001/{workspace.INDEX}": index})
    with pytest.raises(StorageError) as caught, workspace.opened(place):
        pass
    assert f"must be a plain path below its bucket, got {name!r} in {place}" in str(caught.value)
    assert files(tmp_path) == {"work/.lock": ""}


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"files": "abc"}', b'{"files": [1]}', b'{"files": {"a": 1}}'])
def test_an_index_that_is_none_is_told(place, bucket, body):
    bucket.put(**{f"runs/trial-0001/{workspace.INDEX}": body})
    with pytest.raises(StorageError, match=r"/\.index\.json must list the names of files"), workspace.opened(place):
        pass


def test_a_file_that_nobody_could_read_again_is_not_written(place, door):
    with workspace.opened(place) as kept:
        write(kept.path, **{"a\\b": "x"})
        with pytest.raises(StorageError, match="must be a plain path"):
            kept.upload()
        assert door.wrote() == []


def test_the_home_folder_is_resolved_in_a_place(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert workspace.absolute("~/runs") == "/home/me/runs"
    assert workspace.uri("~/my runs") == "file:///home/me/my%20runs"

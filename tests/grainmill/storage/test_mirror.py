"""Mirrors of buckets, against a server of S3 and a proxy before it that counts, breaks and refuses."""

import fcntl
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import layouts
import pytest
from s3_servers import SECRET, ProxyHandler

from grainmill.errors import SourceError
from grainmill.storage import mirror_space, s3
from grainmill.storage.mirror import Mirror
from multigrain.benchmarks.readers import read


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def local(source, folder, limit=None):
    return Mirror(folder, limit).fetch(source)


def problems(source, folder):
    with pytest.raises(SourceError) as caught:
        local(source, folder)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, OSError)
    return [*caught.value.args]


THREE = {"set/a.jpg": b"an apple", "set/b/c.jpg": b"a cat", "set/list.csv": b"image,class"}


def test_a_local_path_is_left_as_it_is(tmp_path):
    assert local("some/../folder", tmp_path) == Path("some/../folder")
    assert list(tmp_path.iterdir()) == []


def test_nothing_heavy_is_imported_before_there_is_a_bucket():
    code = (
        "import sys, grainmill.storage.mirror; print({'boto3', 'botocore', 's3transfer', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


ODD = {"set/a b+c%20.jpg": b"odd", "set/Ä/é &amp;.jpg": b"letters", "set/empty": b""}


@pytest.mark.parametrize("end", ["", "/"])
def test_all_objects_below_a_prefix_are_mirrored_and_no_others(bucket, tmp_path, proxy, end):
    markers = {"set/": b"", "set/folder/": b"", "set/folder/deeper/": b"x"}
    bucket.put(**THREE, **ODD, **markers, **{"set-2/x": b"x", "settings": b"x", "other": b"x"})
    folder = local(f"s3://{bucket.name}/set{end}", tmp_path)
    assert folder == tmp_path / bucket.name / "set"
    assert files(tmp_path / bucket.name) == THREE | ODD
    assert set(proxy.got().values()) == {1}, "one request for each object"


def test_an_object_comes_with_all_that_lies_beside_it(bucket, tmp_path):
    bucket.put(**THREE, other=b"x")
    file = local(f"s3://{bucket.name}/set/list.csv", tmp_path)
    assert file == tmp_path / bucket.name / "set" / "list.csv"
    assert files(tmp_path / bucket.name) == THREE


@pytest.mark.parametrize("key", ["", "/", "/list.csv"])
def test_the_root_of_a_bucket_is_a_prefix_too(bucket, tmp_path, key):
    bucket.put(**{"list.csv": b"image", "a/b.jpg": b"b"})
    assert local(f"s3://{bucket.name}{key}", tmp_path) == tmp_path / f"{bucket.name}{key}"
    assert files(tmp_path / bucket.name) == {"list.csv": b"image", "a/b.jpg": b"b"}


def test_a_listing_of_several_pages_is_read_to_its_end(bucket, tmp_path, proxy):
    proxy.page = "&max-keys=2"
    many = {f"set/{number}": str(number).encode() for number in range(7)}
    bucket.put(**many)
    assert files(local(f"s3://{bucket.name}/set", tmp_path).parent) == many
    assert sum("/" not in path[1:] for path, _ in proxy.seen) == 1 + 4


def test_a_large_object_is_read_in_parts(bucket, tmp_path, proxy):
    body = bytes(range(256)) * (20 * 2**12)  # 20 MiB
    bucket.put(large=body, small=b"small")
    assert files(local(f"s3://{bucket.name}", tmp_path)) == {"large": body, "small": b"small"}
    parts = sorted(int(part[6:].split("-")[0]) for path, part in proxy.seen if path.endswith("/large"))
    assert parts == [0, 8 * 2**20, 16 * 2**20]


def test_what_is_there_is_not_read_again(bucket, tmp_path, proxy):
    bucket.put(**THREE)
    for _ in range(2):
        for source in ("set", "set/list.csv", "set/b", ""):
            local(f"s3://{bucket.name}/{source}", tmp_path)
    assert proxy.got() == Counter(f"/{bucket.name}/{key}" for key in THREE)


def test_a_mirror_follows_its_bucket(bucket, tmp_path, proxy):
    bucket.put(**THREE)
    source = f"s3://{bucket.name}/set"
    local(source, tmp_path)
    bucket.put(**{"set/a.jpg": b"an olive", "set/new": b"new"})  # as long as before
    bucket.delete("set/b/c.jpg")
    proxy.seen.clear()
    local(source, tmp_path)
    left = {"set/a.jpg": b"an olive", "set/list.csv": b"image,class", "set/new": b"new"}
    assert files(tmp_path / bucket.name) == left
    assert not (tmp_path / bucket.name / "set" / "b").exists()
    assert proxy.got() == Counter(f"/{bucket.name}/set/{key}" for key in ("a.jpg", "new"))


def test_what_others_did_to_a_mirror_is_undone(bucket, tmp_path, proxy):
    bucket.put(**THREE)
    source = f"s3://{bucket.name}/set"
    folder = local(source, tmp_path)
    (folder / "a.jpg").write_bytes(b"an elbow")  # as long as before
    (folder / "list.csv").unlink()
    (folder / "strange").mkdir()
    (folder / "strange" / "file").write_text("")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("")
    (folder / "link").symlink_to(outside)
    proxy.seen.clear()
    local(source, tmp_path)
    assert files(tmp_path / bucket.name) == THREE
    assert not (folder / "strange").exists()
    assert not (folder / "link").is_symlink()
    assert (outside / "mine").exists()
    assert len(proxy.got()) == 2
    folder.rename(tmp_path / "moved")
    folder.symlink_to(outside)
    local(source, tmp_path)
    assert files(folder.parent) == THREE
    assert files(outside) == {"mine": b""}


def test_a_prefix_within_another_does_not_make_it_forget(bucket, tmp_path):
    bucket.put(**THREE)
    local(f"s3://{bucket.name}/set", tmp_path)
    bucket.put(**{"set/b/c.jpg": b"a cow"})
    local(f"s3://{bucket.name}/set/b", tmp_path)
    assert files(tmp_path / bucket.name) == THREE | {"set/b/c.jpg": b"a cow"}
    bucket.put(**{"set/b/c.jpg": b"a cat"})
    local(f"s3://{bucket.name}/set", tmp_path)
    assert files(tmp_path / bucket.name) == THREE


def test_an_object_may_become_a_folder_and_a_folder_an_object(bucket, tmp_path):
    source = f"s3://{bucket.name}"
    bucket.put(**{"a": b"1", "b/c": b"2"})
    local(source, tmp_path)
    for key in ("a", "b/c"):
        bucket.delete(key)
    bucket.put(**{"a/d/e": b"3", "b": b"4"})
    local(f"{source}/a/d", tmp_path)
    assert files(tmp_path / bucket.name) == {"a/d/e": b"3", "b/c": b"2"}
    local(source, tmp_path)
    assert files(tmp_path / bucket.name) == {"a/d/e": b"3", "b": b"4"}


def test_a_benchmark_is_read_from_a_mirror_as_from_a_folder(bucket, tmp_path):
    root = layouts.copydays(tmp_path / "here", crops=("crops/10",), distractors=2)
    bucket.put(**{f"sets/{name}": content for name, content in files(root).items()})
    there, here = read("copydays", local(f"s3://{bucket.name}/sets", tmp_path / "cache")), read("copydays", root)
    assert [one.path.relative_to(tmp_path / "cache" / bucket.name / "sets") for one in there.database] == [
        one.path.relative_to(root) for one in here.database
    ]
    assert (len(there.queries), there.problems) == (len(here.queries), here.problems)


@pytest.mark.parametrize("page", [1, 2, 3, 1000])
def test_single_objects_are_looked_up_from_key_to_key(bucket, tmp_path, proxy, page):
    proxy.page = f"&max-keys={page}"
    keys = [f"set/{number:03}.png" for number in range(60)]
    near = ["set/010.pnf1", "set/010.pnf2"]  # just before a key that is wanted
    bucket.put(**{key: key.encode() for key in (*keys, "a", *near, "set/z", "z", "é/ö.png")})
    wanted = [*keys[10:14], keys[30], keys[59], "é/ö.png"]
    absent = ["set/0305.png", "set/", "z/", "b", "ü"]
    urls = [f"s3://{bucket.name}/{key}" for key in (*wanted, *absent) if key[-1] != "/"]
    Mirror(tmp_path).fetch_objects(dict.fromkeys(urls))
    assert files(tmp_path / bucket.name) == {key: key.encode() for key in wanted}
    pages = sum("/" not in path[1:] for path, _ in proxy.seen)
    assert pages <= (1 if page == 1000 else 2 * (len(wanted) + len(absent)))


def test_a_single_object_that_is_gone_leaves_no_file_and_others_stay(bucket, tmp_path):
    bucket.put(**THREE, **{"set/d": b"file"})
    local(f"s3://{bucket.name}/set", tmp_path)
    for key in ("set/a.jpg", "set/d"):
        bucket.delete(key)
    bucket.put(**{"set/d/e": b"in a folder"})
    urls = [f"s3://{bucket.name}/{key}" for key in ("set/a.jpg", "set/d", "set/d/e")]
    Mirror(tmp_path).fetch_objects(dict.fromkeys(urls))
    left = {"set/b/c.jpg": b"a cat", "set/list.csv": b"image,class", "set/d/e": b"in a folder"}
    assert files(tmp_path / bucket.name) == left


# --- what goes wrong on the way


FAULTS = {
    "busy": [(503, "SlowDown"), (503, "SlowDown")],
    "cut": ["cut", "cut"],
    "shorter": ["shorter", "shorter"],
    "both": ["cut", (500, "InternalError"), "shorter"],
}


@pytest.mark.parametrize("faults", FAULTS)
def test_a_reading_that_fails_is_repeated(bucket, tmp_path, proxy, faults):
    bucket.put(**THREE)
    proxy.faults[f"/{bucket.name}/set/a.jpg"] = [*FAULTS[faults]]
    local(f"s3://{bucket.name}/set", tmp_path)
    assert files(tmp_path / bucket.name) == THREE
    assert proxy.got()[f"/{bucket.name}/set/a.jpg"] == 1 + len(FAULTS[faults])


def test_a_listing_that_fails_is_repeated(bucket, tmp_path, proxy):
    bucket.put(**THREE)
    proxy.faults[f"/{bucket.name}"] = [(503, "SlowDown"), (503, "SlowDown")]
    assert local(f"s3://{bucket.name}/set", tmp_path).is_dir()


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ((503, "SlowDown"), ["answers SlowDown", "try again later"]),
        ((403, "AccessDenied"), ["access is denied", "s3:GetObject"]),
        ((400, "ExpiredToken"), ["expired", "renew"]),
        ((404, "NoSuchKey"), ["must stay as it was listed"]),
        ("cut", ["answers in time"]),
        ("shorter", ["must have 8 bytes as listed, got 4"]),
    ],
)
def test_an_object_that_cannot_be_read_is_named_and_leaves_nothing(bucket, tmp_path, proxy, faults, told):
    bucket.put(**THREE)
    proxy.faults[f"/{bucket.name}/set/a.jpg"] = [faults] * 99
    (problem,) = problems(f"s3://{bucket.name}/set", tmp_path)
    assert problem.startswith(f"s3://{bucket.name}/set/a.jpg ")
    assert all(words in problem for words in told), problem
    there = files(tmp_path / bucket.name) if (tmp_path / bucket.name).exists() else {}
    assert there.items() <= THREE.items()
    assert "set/a.jpg" not in there
    proxy.faults.clear()
    local(f"s3://{bucket.name}/set", tmp_path)
    assert files(tmp_path / bucket.name) == THREE


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ((403, "AccessDenied"), ["access is denied", "s3:ListBucket"]),
        ((400, "ExpiredToken"), ["have expired; renew"]),
        ((403, "InvalidAccessKeyId"), ["refuses these", "127.0.0.1:"]),
        ((403, "SignatureDoesNotMatch"), ["refuses these"]),
        ((418, "{odd}"), ["127.0.0.1:", "answers {odd}"]),
    ],
)
def test_a_listing_that_is_refused_is_told(bucket, tmp_path, proxy, fault, told):
    proxy.faults[f"/{bucket.name}"] = [fault] * 99
    (problem,) = problems(f"s3://{bucket.name}/set", tmp_path)
    assert all(words in problem for words in (*told, f"s3://{bucket.name}/set ")), problem
    assert len(proxy.seen) == 1, "it is told at once"


def test_what_is_not_in_the_endpoint_is_told(bucket, tmp_path):
    bucket.put(**{"marker/": b""})
    (problem,) = problems("s3://nowhere/set", tmp_path)
    assert "none of that name" in problem
    for prefix in ("marker", "marker/", "absent"):
        (problem,) = problems(f"s3://{bucket.name}/{prefix}", tmp_path)
        assert "there are none" in problem
    assert not (tmp_path / bucket.name).exists()


def test_a_mirror_outlives_a_wrong_prefix_and_an_emptied_bucket(bucket, tmp_path):
    bucket.put(**THREE)
    local(f"s3://{bucket.name}/set", tmp_path)
    for key in THREE:
        bucket.delete(key)
    problems(f"s3://{bucket.name}/set", tmp_path)
    assert files(tmp_path / bucket.name) == THREE


def test_missing_credentials_are_told_at_once(bucket, tmp_path, proxy, monkeypatch, waits):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    (problem,) = problems(f"s3://{bucket.name}/set", tmp_path)
    assert "needs credentials" in problem
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (problem,) = problems(f"s3://{bucket.name}/set", tmp_path)
    assert "needs credentials" in problem
    monkeypatch.setenv("AWS_PROFILE", "absent")
    (problem,) = problems(f"s3://{bucket.name}/set", tmp_path)
    assert "AWS_PROFILE" in problem
    assert (proxy.seen, waits) == ([], [])


def test_an_endpoint_that_does_not_answer_is_told_after_a_bounded_time(bucket, tmp_path, monkeypatch, waits):
    with ThreadingHTTPServer(("127.0.0.1", 0), ProxyHandler) as closed:
        port = closed.server_port
    for url, told in ((f"http://127.0.0.1:{port}", f"127.0.0.1:{port} "), (f"http://me:{SECRET}@127.0.0.1:{port}", "")):
        waits.clear()
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        (problem,) = problems(f"s3://{bucket.name}/set", tmp_path)
        assert "answers in time" in problem
        assert told in problem
        assert "me:" not in problem
        assert len(waits) == 4
        assert sum(waits) <= 1 + 2 + 4 + 8


@pytest.mark.parametrize("url", ["127.0.0.1:9000", f"me:{SECRET}@host"])
def test_an_endpoint_that_is_no_url_is_told_without_it(bucket, tmp_path, monkeypatch, url):
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    (problem,) = problems(f"s3://{bucket.name}/set", tmp_path)
    assert "AWS_ENDPOINT_URL" in problem
    assert url not in problem


def test_a_region_that_is_none_is_told(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "##")
    (problem,) = problems(f"s3://{bucket.name}/set", tmp_path)
    assert "InvalidRegionError" in problem


# --- crashes and company


def test_a_crash_leaves_no_half_file_and_costs_only_what_was_missing(bucket, tmp_path, proxy, monkeypatch):
    keys = [f"set/{number}" for number in range(6)]
    bucket.put(**{key: key.encode() for key in keys})
    monkeypatch.setattr(s3, "REQUESTS", 1)
    download = s3.S3Prefix.download

    def crash(store, entry, draft):
        download(store, entry, draft)
        if entry.key == "set/2":
            raise RuntimeError("crash")

    monkeypatch.setattr(s3.S3Prefix, "download", crash)
    with pytest.raises(RuntimeError, match="crash"):
        local(f"s3://{bucket.name}/set", tmp_path)
    monkeypatch.setattr(s3.S3Prefix, "download", download)
    assert files(tmp_path / bucket.name) == {key: key.encode() for key in keys[:2]}
    proxy.seen.clear()
    local(f"s3://{bucket.name}/set", tmp_path)
    assert files(tmp_path / bucket.name) == {key: key.encode() for key in keys}
    assert proxy.got() == Counter(f"/{bucket.name}/{key}" for key in keys[2:])


MIRROR = """
import pathlib, sys
from grainmill.storage import s3
from grainmill.storage.mirror import Mirror
{}
Mirror(pathlib.Path(sys.argv[2])).fetch(sys.argv[1])
"""


def test_a_killed_process_leaves_no_half_file_and_costs_only_what_was_missing(bucket, tmp_path, proxy):
    keys = [f"set/{number}" for number in range(6)]
    bucket.put(**{key: key.encode() for key in keys})
    code = MIRROR.format("s3.REQUESTS = 1")
    child = subprocess.Popen([sys.executable, "-c", code, f"s3://{bucket.name}/set", str(tmp_path)])
    proxy.faults[f"/{bucket.name}/set/3"] = [lambda: child.send_signal(signal.SIGKILL)]
    assert child.wait() == -signal.SIGKILL
    assert files(tmp_path / bucket.name) == {key: key.encode() for key in keys[:3]}
    with (tmp_path / ".s3" / bucket.name / "records").open("ab") as records:
        records.write(b'\n["set/3", 5, "cut sh')
    (tmp_path / ".s3" / bucket.name / "drafts" / "left").write_text("over")
    proxy.seen.clear()
    for _ in range(2):
        local(f"s3://{bucket.name}/set", tmp_path)
    assert files(tmp_path / bucket.name) == {key: key.encode() for key in keys}
    assert proxy.got() == Counter(f"/{bucket.name}/{key}" for key in keys[3:])
    assert list((tmp_path / ".s3" / bucket.name / "drafts").iterdir()) == []


def test_two_processes_read_each_object_once(bucket, tmp_path, proxy):
    bucket.put(**THREE, **ODD)
    command = [sys.executable, "-c", MIRROR.format(""), f"s3://{bucket.name}/set", str(tmp_path)]
    children = [subprocess.Popen(command) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert files(tmp_path / bucket.name) == THREE | ODD
    assert set(proxy.got().values()) == {1}


def test_nothing_is_asked_while_another_process_has_the_mirror(bucket, tmp_path, proxy, monkeypatch):
    bucket.put(**THREE)
    books = tmp_path / ".s3" / bucket.name
    books.mkdir(parents=True)
    waiting, flock = threading.Event(), fcntl.flock
    monkeypatch.setattr(mirror_space.fcntl, "flock", lambda *lock: (waiting.set(), flock(*lock)))
    with (books / "lock").open("w") as lock:
        flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=local, args=(f"s3://{bucket.name}/set", tmp_path))
        thread.start()
        assert waiting.wait(60)
        assert proxy.seen == []
    thread.join()
    assert files(tmp_path / bucket.name) == THREE


def test_a_full_disk_is_told_before_anything_is_read(bucket, tmp_path, proxy, monkeypatch):
    bucket.put(one=b"x" * 20_000_000, two=b"x" * 10_000_000)
    monkeypatch.setattr(mirror_space.shutil, "disk_usage", lambda _: SimpleNamespace(total=1e9, free=29_999_999))
    (problem,) = problems(f"s3://{bucket.name}", tmp_path)
    assert f"needs 0.03 GB free in {tmp_path}, got 0.03 beside what is in use; raise `cache_limit`, or" in problem
    assert proxy.got() == Counter()
    monkeypatch.setattr(mirror_space.shutil, "disk_usage", lambda _: SimpleNamespace(total=1e9, free=30_000_000))
    local(f"s3://{bucket.name}", tmp_path)
    monkeypatch.setattr(mirror_space.shutil, "disk_usage", lambda _: SimpleNamespace(total=1e9, free=0))
    local(f"s3://{bucket.name}", tmp_path)


# --- names


WRONG = {
    "set/1": "set/..%2F..%2Fout",
    "set/2": "set/.",
    "set/3": "set//x",
    "set/4": "set/..%5C..%5Cout",
    "set/5": "set/%00",
    "set/6": f"set/{'n' * 256}",
    "set/7": "%2Fetc/set",
}


def test_every_key_that_is_no_path_below_its_bucket_is_named_and_nothing_is_read(bucket, tmp_path, proxy):
    bucket.put(**dict.fromkeys(WRONG, b"bad"), good=b"good")
    bucket.put(**{f"set/{'n' * 255}": b"good", "set/...": b"good", "set/..a": b"good"})
    proxy.renamed = {f"<Key>{old}</Key>".encode(): f"<Key>{new}</Key>".encode() for old, new in WRONG.items()}
    told = problems(f"s3://{bucket.name}", tmp_path)
    assert [problem.split("got ")[1].split(" in ")[0] for problem in told] == [
        repr(unquote(new)) for new in WRONG.values()
    ]
    assert proxy.got() == Counter()
    assert not (tmp_path / bucket.name).exists()


def test_a_key_cannot_be_an_object_and_a_folder(bucket, tmp_path):
    bucket.put(**{"set/a": b"1", "set/a/b": b"2", "set/a-b": b"3"})
    (problem,) = problems(f"s3://{bucket.name}/set", tmp_path)
    assert "an object and a folder at once, got 'set/a'" in problem
    local(f"s3://{bucket.name}/set/a/", tmp_path)
    assert files(tmp_path / bucket.name) == {"set/a/b": b"2"}


@pytest.mark.parametrize(
    "source", ["s3://", "s3:///set", f"s3://me:{SECRET}@bucket/set", "s3://../set", "s3://.s3/set"]
)
def test_a_bucket_that_is_none_is_not_told(tmp_path, source):
    (problem,) = problems(source, tmp_path)
    assert "must be s3://bucket/prefix" in problem
    assert "me:" not in problem


@pytest.mark.parametrize("key", ["../out", "set/../../out", "/set", "/", "set//", "set/.", "set\\..", "set\0"])
def test_a_prefix_that_is_no_plain_path_is_refused(tmp_path, key):
    (problem,) = problems(f"s3://bucket/{key}", tmp_path)
    assert f"got {key!r}" in problem
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_mirror_is_not_touched(bucket, tmp_path):
    bucket.put(**THREE)
    (tmp_path / bucket.name).mkdir()
    (tmp_path / bucket.name / "mine").write_text("mine")
    (problem,) = problems(f"s3://{bucket.name}/set", tmp_path)
    assert "name another folder in `cache`" in problem
    assert files(tmp_path) == {f"{bucket.name}/mine": b"mine"}


def test_a_cache_that_cannot_be_written_is_told(bucket, tmp_path):
    (tmp_path / "file").write_text("")
    (problem,) = problems(f"s3://{bucket.name}/set", tmp_path / "file" / "cache")
    assert "Not a directory" in problem
    assert "name another folder in `cache`" in problem

"""Names from elsewhere: none leads out of the folder that it is joined to."""

import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grainmill.errors import StorageError
from grainmill.storage.names import below, check_keys, is_local

ODD = [
    *("", "/", "/tmp/x", "//tmp/x", "a//b", "/a", "a/", ".", "..", "a/.", "a/..", "../x", "a/../../x", "./a"),
    *("a\\b", "..\\..\\x", "C:\\x", "a\0b", "\0", "a\nb", "a\x1b[2Jb", "a\x7f", "a\x85b", "\ud800", "a/\udc80"),
    *("n" * 256, "é" * 128, f"a/{'n' * 256}", "/".join(["n" * 200] * 6)),
    *(None, 5, b"a", ["a"]),
]
PLAIN = ["a", "a/b", "...", "..a", "a..", ".a", "a b", "a%2F..", "é/ü.png", "n" * 255, "~", "-rf", "a:b", "a?b=c", "*"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_a_name_that_could_lead_elsewhere_is_none(name):
    assert not is_local(name)


@pytest.mark.parametrize("name", PLAIN, ids=ascii)
def test_a_plain_name_is_one(name):
    assert is_local(name)


PIECES = st.sampled_from(["..", ".", "/", "\\", "a", "\0", "\n", "~", "tmp", "é", "\ud800", "n" * 100])


@given(st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=40))
@example("a/" + "../" * 20 + "etc")
@settings(deadline=None)
def test_a_local_name_is_normal_and_stays_below_any_folder(name):
    if not is_local(name):
        return
    path = os.path.join("/some/folder", name)
    assert os.path.normpath(path) == path
    assert path.startswith("/some/folder/")
    assert Path("/some/folder", name).parts[:3] == ("/", "some", "folder")
    assert Path("/some/folder", name).relative_to("/some/folder").as_posix() == name
    assert name.isprintable() or not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in name)


def test_all_keys_that_are_none_are_told_with_their_place():
    with pytest.raises(StorageError) as caught:
        check_keys("s3://b/p", ["a", "../x", "b", "/tmp/x", "c/d", "c", "c-d"])
    assert [problem.partition(";")[0] for problem in caught.value.args] == [
        "a key must be a plain path below its bucket, got '../x' in s3://b/p",
        "a key must be a plain path below its bucket, got '/tmp/x' in s3://b/p",
        "a key must not be an object and a folder at once, got 'c' in s3://b/p",
    ]


def test_a_link_leads_no_path_out_of_its_folder(tmp_path):
    (tmp_path / "home/in").mkdir(parents=True)
    (tmp_path / "home/up").symlink_to("..")
    (tmp_path / "home/file").symlink_to("/etc/hostname")
    (tmp_path / "home/same").symlink_to("in")
    assert below(tmp_path / "home", "in/x", "MLmodel") == tmp_path / "home/in/x"
    assert below(tmp_path / "home", "same/x", "MLmodel") == tmp_path / "home/same/x"
    (tmp_path / "home/loop").symlink_to("../home/loop/..")
    for name in ("up/x", "up", "file", "../home/in", "/etc/hostname", None):
        with pytest.raises(StorageError, match=r"a path in MLmodel must lead to a file below its folder, got"):
            below(tmp_path / "home", name, "MLmodel")

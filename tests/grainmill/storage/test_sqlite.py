import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy

from grainmill.storage import sqlite


@pytest.fixture
def file(tmp_path):
    """A SQLite file of several pages of 4,096 bytes."""
    with closing(sqlite3.connect(tmp_path / "x.db")) as database:
        database.execute("CREATE TABLE words (word TEXT)")
        database.executemany("INSERT INTO words VALUES (?)", [("w" * 1000,)] * 20)
        database.commit()
    return tmp_path / "x.db"


def test_whole_file_and_one_that_is_not_there_are_right(file):
    before = file.read_bytes()
    assert sqlite.problem(file) is None
    assert sqlite.problem(file.with_name("none.db")) is None
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["x.db"]


@pytest.mark.parametrize("name", ["plain", "a b", "50%20 off", "what?", "me@home", "x#1", "a?b#c%3Fd@e", "[v2]", "é"])
def test_address_leads_to_its_file_whatever_the_path(name, tmp_path, monkeypatch):
    folder = tmp_path / name
    folder.mkdir()
    url = sqlite.url_of(folder / "x.db")
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE words (word TEXT)"))
    engine.dispose()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.db")] == [Path(name, "x.db")]
    assert sqlite.file_of(url) == folder / "x.db"
    monkeypatch.chdir(folder)
    assert sqlite.url_of(Path("x.db")) == url


def test_address_of_a_plain_path_is_the_path():
    assert sqlite.url_of(Path("/a b@c/x.db")) == "sqlite:////a b@c/x.db"


@pytest.mark.parametrize("url", ["postgresql://h/x", "sqlite://", "sqlite:///:memory:", "http://h", "/folder"])
def test_address_of_no_file_has_none(url):
    assert sqlite.file_of(url) is None


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (0, "is empty; put a copy of it in its place, or delete it to begin anew"),
        (10, "is no SQLite file; put a copy"),
        (100, "is cut short or damaged; put a copy"),
        (4096, "is cut short or damaged; put a copy"),
        (-4096, "is cut short or damaged; put a copy"),
        (-100, "is cut short or damaged; put a copy"),
    ],
)
def test_file_that_is_cut_short_is_named(left, reason, file):
    os.truncate(file, left if left >= 0 else file.stat().st_size + left)
    assert sqlite.problem(file).startswith(f"{file} {reason}")


def test_file_of_something_else_is_named(file):
    file.write_bytes(b"something" * 512)
    assert "is no SQLite file" in sqlite.problem(file)


def test_folder_pipe_and_dangling_link_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    found = {name: sqlite.problem(tmp_path / name) for name in ("folder", "link", "pipe")}
    assert [text.partition(";")[0].rpartition("/")[2] for text in found.values()] == [
        "folder is a folder",
        "link is no file",
        "pipe is no file",
    ]


@pytest.mark.parametrize("closed", ["file", "folder"])
def test_file_that_this_user_cannot_write_is_named(closed, file, monkeypatch):
    forbidden = file if closed == "file" else file.parent
    monkeypatch.setattr(os, "access", lambda place, _: place != forbidden)  # root may write everywhere
    assert f"{file} and its folder must be writable for user {os.getuid()};" in sqlite.problem(file)


def test_file_that_is_locked_is_named(file, monkeypatch):
    monkeypatch.setattr(sqlite, "LOCK_SECONDS", 0)
    with closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "has been locked by another process" in sqlite.problem(file)
    assert sqlite.problem(file) is None

"""Environment of a process whose user has no name, no home, or no temporary folder with a short path."""

import getpass
import os
import pwd
import tempfile
from pathlib import Path

import pytest

from grainmill import environment
from grainmill.errors import StorageError


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Parent of the folder that is made for this user, with a path as short as that of `/tmp`."""
    monkeypatch.setattr(environment, "SHORT_PLACES", (str(tmp_path / "none"), str(tmp_path)))
    for name in ("HOME", "LOGNAME", "TMPDIR", "RAY_TMPDIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # so that what is set here is taken back
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    return tmp_path / f"grainmill-{os.getuid()}"


def nobody(_):
    raise KeyError


@pytest.mark.parametrize("home", [None, "", "relative", "{folder}/file", "{folder}/no/folder"])
def test_number_without_a_home_gets_a_name_and_a_home_of_its_own(home, own, tmp_path, monkeypatch):
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(os, "access", lambda place, _: str(place) != "/")  # the root may write there
    (tmp_path / "file").touch()
    if home is not None:
        monkeypatch.setenv("HOME", home.format(folder=tmp_path))
    environment.complete_user()
    assert (Path.home(), getpass.getuser()) == (own, str(os.getuid()))
    assert own.stat().st_mode & 0o777 == 0o700


def test_user_with_a_home_keeps_it(own, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    environment.complete_user()
    assert os.environ["HOME"] == str(tmp_path)
    assert "RAY_TMPDIR" not in os.environ
    assert not own.exists()


def test_read_only_home_is_left_but_its_credentials_are_still_found(own, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / ".aws").mkdir(parents=True)
    (home / ".aws" / "config").write_text("[default]\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(os, "access", lambda place, _: place != home)
    for _ in range(2):
        environment.complete_user()
        assert Path.home() == own
        assert Path("~/.aws/config").expanduser().read_text() == "[default]\n"


def test_long_temporary_folder_goes_by_a_short_link(own, tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(environment, "SOCKET_ROOM", len(os.fsencode(own)) + 20)
    environment.complete_user()
    assert os.environ["TMPDIR"] == tempfile.gettempdir()
    assert Path(os.environ["TMPDIR"]).parent == own
    assert Path(os.environ["TMPDIR"]).samefile(long)
    assert "RAY_TMPDIR" not in os.environ


@pytest.mark.parametrize("named", [None, "{folder}/no/folder", "{folder}/" + "x" * 100])
def test_ray_gets_a_folder_where_it_can_make_sockets(named, own, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    if named is None:
        monkeypatch.setattr(os, "access", lambda place, _: str(place) not in ("/tmp", "/tmp/ray"))
    else:
        monkeypatch.setenv("RAY_TMPDIR", named.format(folder=tmp_path))
    environment.complete_user()
    assert os.environ["RAY_TMPDIR"] == str(own)


def test_folder_that_somebody_else_may_have_made_is_not_used(own, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "none")
    own.symlink_to(tmp_path)
    with pytest.raises(StorageError, match=rf"user {os.getuid()} can write neither .*; set HOME and TMPDIR"):
        environment.complete_user()
    own.unlink()
    own.mkdir(0o755)
    own.chmod(0o755)
    with pytest.raises(StorageError, match="set HOME and TMPDIR"):
        environment.complete_user()

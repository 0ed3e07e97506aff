"""Which files of a folder are images, and why each of the others is left out."""

import os
import socket

import pytest

from multigrain.data import listing
from multigrain.data.listing import (
    LISTED,
    LOOP,
    LOST,
    OTHER,
    SPECIAL,
    list_by_folder,
    list_folders,
    list_images,
    list_keys,
)
from multigrain.errors import DataError


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_images_are_sorted_folder_by_folder(tmp_path):
    write(tmp_path, "b/2.JPG", "b/1.png", "b.png", "a-b/3.jpg", "a/4.jpg")
    assert list_images(tmp_path) == (["a/4.jpg", "a-b/3.jpg", "b/1.png", "b/2.JPG", "b.png"], {}, 0)
    assert list_images(tmp_path, deep=False) == (["b.png"], {}, 0)


LITTER = (
    *(".DS_Store", "._a.jpg", ".hidden.png", "Thumbs.db", "a/Thumbs.db", "a/.thumbnails/1.jpg", "a/@eaDir/1.jpg"),
    *("__MACOSX/a/._1.jpg", ".ipynb_checkpoints/1-checkpoint.png", "a/desktop.ini", "$RECYCLE.BIN/1.jpg"),
)


def test_what_systems_leave_behind_is_counted_and_not_entered(tmp_path):
    write(tmp_path, "a/1.jpg", *LITTER)
    assert list_images(tmp_path) == (["a/1.jpg"], {}, len(LITTER))
    assert list_keys(["a/1.jpg", "a/", *LITTER]) == (["a/1.jpg"], {}, len(LITTER))


def test_a_folder_may_be_hidden_itself(tmp_path):
    write(tmp_path, ".cache/set/1.jpg")
    assert list_images(tmp_path / ".cache/set").names == ["1.jpg"]


READ = ("jpg", "JPEG", "jpe", "jfif", "png", "webp", "gif", "tif", "tiff", "bmp", "ppm", "pgm", "pbm", "pnm", "avif")
UNREAD = ("TGA", "cr2", "jp2", "nef", "psd", "svg")


def test_types_are_told_by_the_suffix(tmp_path):
    write(tmp_path, "notes.txt", "jpg", "a.jpg.part", *(f"1.{kind}" for kind in (*READ, *UNREAD)))
    found = list_images(tmp_path)
    assert sorted(found.names) == sorted(f"1.{kind}" for kind in READ)
    unread = {f"1.{kind}": f"is a .{kind.lower()} file, which is not read" for kind in UNREAD}
    assert {name: reason.split(";")[0] for name, reason in found.unread.items()} == unread
    assert found.left_out == {**found.unread, "notes.txt": OTHER, "jpg": OTHER, "a.jpg.part": OTHER}
    assert list_keys(["1.jp2", "2.jpg", "3.txt"]).left_out == {"1.jp2": found.left_out["1.jp2"], "3.txt": OTHER}


@pytest.mark.parametrize("installed", [True, False])
def test_heic_is_read_where_its_reader_is_installed(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(listing, "find_spec", lambda name: (name == "pillow_heif" and installed) or None)
    write(tmp_path, "1.heic", "2.HEIF")
    found = list_images(tmp_path)
    assert found.names == (["1.heic", "2.HEIF"] if installed else [])
    reason = "is a {} file, which needs the package pillow-heif"
    told = {"1.heic": reason.format(".heic"), "2.HEIF": reason.format(".heif")}
    assert found.left_out == ({} if installed else told)


def test_links_to_files_and_folders_are_followed(tmp_path):
    write(tmp_path, "pool/1.jpg", "pool/deep/2.jpg", "pool/blob")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/all").symlink_to(tmp_path / "pool", target_is_directory=True)
    (tmp_path / "set/x.png").symlink_to("../pool/blob")
    assert list_images(tmp_path / "set") == (["all/1.jpg", "all/deep/2.jpg", "x.png"], {"all/blob": OTHER}, 0)


def test_what_several_names_lead_to_is_listed_once(tmp_path):
    write(tmp_path, "set/b/1.jpg", "pool/2.jpg", "pool/3.jpg")
    (tmp_path / "set/a").symlink_to("b", target_is_directory=True)
    (tmp_path / "set/0.jpg").symlink_to("b/1.jpg")
    for name in ("p1", "p2"):
        (tmp_path / "set" / name).symlink_to("../pool", target_is_directory=True)
        (tmp_path / "set" / f"{name}.jpg").symlink_to("../pool/3.jpg")
    assert list_images(tmp_path / "set") == (
        ["b/1.jpg", "p1/2.jpg", "p1/3.jpg"],
        dict.fromkeys(["0.jpg", "a", "p1.jpg", "p2", "p2.jpg"], LISTED),
        0,
    )


def test_two_names_of_one_content_are_two_images_unless_one_is_a_link(tmp_path):
    write(tmp_path, "1.jpg")
    os.link(tmp_path / "1.jpg", tmp_path / "2.jpg")
    assert list_images(tmp_path).names == ["1.jpg", "2.jpg"]


def test_loops_end_and_links_to_nothing_are_told(tmp_path):
    write(tmp_path, "set/a/1.jpg", "set/notes.txt")
    (tmp_path / "set/a/up").symlink_to("..", target_is_directory=True)
    (tmp_path / "set/self.jpg").symlink_to("self.jpg")
    (tmp_path / "set/gone.jpg").symlink_to("nowhere/1.jpg")
    (tmp_path / "set/under.jpg").symlink_to("notes.txt/1.jpg")
    assert list_images(tmp_path / "set") == (
        ["a/1.jpg"],
        {"a/up": LISTED, "gone.jpg": LOST, "notes.txt": OTHER, "self.jpg": LOOP, "under.jpg": LOST},
        0,
    )


def test_a_folder_above_may_be_linked(tmp_path):
    write(tmp_path, "beside/2.jpg", "set/1.jpg")
    (tmp_path / "set/up").symlink_to("..", target_is_directory=True)
    assert list_images(tmp_path / "set") == (["1.jpg", "up/beside/2.jpg"], {"up/set": LISTED}, 0)


def test_pipes_and_sockets_are_never_opened(tmp_path):
    write(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "to-pipe.jpg").symlink_to("pipe.jpg")
    (tmp_path / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        found = list_images(tmp_path)
    assert found == (["1.jpg"], dict.fromkeys(["null.png", "pipe.jpg", "s.jpg", "to-pipe.jpg"], SPECIAL), 0)


def refuse_to_scan(monkeypatch, *closed):
    """Root may read every folder, so that one is closed by hand."""
    scan = os.scandir

    def scandir(path):
        if os.path.basename(os.path.normpath(path)) in closed:
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_closed_folder_is_told_and_a_closed_root_refused(tmp_path, monkeypatch):
    write(tmp_path, "set/a/1.jpg", "set/b/2.jpg")
    refuse_to_scan(monkeypatch, "a")
    assert list_images(tmp_path / "set") == (["b/2.jpg"], {"a": "cannot be listed (Permission denied)"}, 0)
    with pytest.raises(DataError, match=r"must be readable, but .*set/a is not \(Permission denied\); change"):
        list_images(tmp_path / "set/a")


def test_what_is_no_folder_has_no_images(tmp_path):
    write(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe")
    for name in ("nowhere", "1.jpg", "pipe"):
        assert list_images(tmp_path / name) == ([], {}, 0)
        assert list_folders(tmp_path / name) == []


def test_some_folders_are_listed_each_with_its_images(tmp_path):
    write(tmp_path, "train/b/1.jpg", "train/a/deep/2.jpg", "train/0.jpg", "val/a/3.jpg", "test/a/4.jpg", ".git/5.jpg")
    (tmp_path / "val/b").symlink_to("../train/b", target_is_directory=True)
    assert list_folders(tmp_path) == ["test", "train", "val"]
    found, whole = list_by_folder(tmp_path, ["train/a", "train/b", "val/a", "val/b"])
    assert {
        place: [path.relative_to(tmp_path / place).as_posix() for path in paths] for place, paths in found.items()
    } == {
        "train/a": ["deep/2.jpg"],
        "train/b": ["1.jpg"],
        "val/a": ["3.jpg"],
        "val/b": [],
    }
    assert whole.left_out == {"val/b": LISTED}


def test_names_that_are_not_text_are_listed(tmp_path):
    name = os.fsdecode(b"\xe9.jpg")
    write(tmp_path, name)
    assert list_images(tmp_path).names == [name]

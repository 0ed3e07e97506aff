"""Refusal of changed, missing and pickled files of a portable model."""

import io
import json
import pickle
import struct
import zipfile
from hashlib import sha256

import pytest
import torch

from grainmill.registry import integrity


@pytest.fixture
def folder(tmp_path):
    """A portable model of two files."""
    (tmp_path / "deep").mkdir()
    write_sealed(tmp_path, {"model.py": b"load = None\n", "deep/weights": bytes(range(256))})
    return tmp_path


def write_sealed(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest = {name: {"bytes": len(x), "sha256": sha256(x).hexdigest()} for name, x in files.items()}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


def test_a_model_as_it_was_made_has_no_faults(folder):
    known = sha256((folder / "MANIFEST.json").read_bytes()).hexdigest()
    assert integrity.manifest_digest(folder) == known
    assert integrity.faults(folder) == integrity.faults(folder, known) == []
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"")
    assert integrity.faults(folder) == []


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "deep/weights").write_bytes(bytes(255)), "deep/weights was changed"),
        (lambda f: (f / "deep/weights").write_bytes(bytes(256)), "deep/weights was changed"),
        (lambda f: (f / "model.py").unlink(), "model.py is missing"),
        (lambda f: (f / "other.py").touch(), "other.py is not listed"),
        (lambda f: (f / "MANIFEST.json").unlink(), "MANIFEST.json cannot be read"),
        (lambda f: (f / "MANIFEST.json").write_text("{"), "MANIFEST.json cannot be read"),
    ],
    ids=["cut", "flipped", "missing", "added", "no manifest", "cut manifest"],
)
def test_what_was_changed_is_named(folder, damage, told):
    damage(folder)
    (fault,) = integrity.faults(folder)
    assert fault.startswith(told)


def test_a_link_is_not_the_file_that_was_made(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "weights"
    (folder / "deep/weights").rename(elsewhere)
    (folder / "deep/weights").symlink_to(elsewhere)
    assert integrity.faults(folder) == ["deep/weights was changed"]


def test_a_manifest_that_fits_other_files_is_not_the_one_that_is_known(folder):
    known = integrity.manifest_digest(folder)
    write_sealed(folder, {"model.py": b"evil\n", "deep/weights": b""})
    assert integrity.faults(folder) == []
    assert integrity.faults(folder, known) == ["MANIFEST.json was changed"]


def zipped(name, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("plain.json", "{}")
        archive.writestr(name, content)
    return buffer.getvalue()


def saved_by_torch():
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(2)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"protocol-{number}", pickle.dumps({"a": [1, 2]}, protocol=number)) for number in (2, 3, 4, 5)),
        ("named.pkl", b"hello"),
        ("named.pth", b"hello"),
        ("archive", zipped("data/sample", pickle.dumps(3))),
        ("archive-of-named", zipped("data/sample.pt", b"hello")),
        ("of-torch", saved_by_torch()),
    ],
)
def test_a_pickle_is_found_by_content_and_by_name(folder, name, content):
    write_sealed(folder, {"model.py": b"", "deep/weights": b"", name: content})
    assert integrity.faults(folder) == [f"{name} holds a pickle"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"\x80\x04", b"\x80\x04" + bytes(100), b"text", zipped("a/b.json", b"{}"), zipped("e.pt", b"")],
)
def test_what_only_begins_like_one_is_none(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert integrity.pickle_fault(tmp_path / "file") is None


def shifted(archive, before):
    """An archive with the bytes `before` in front; its directory tells the same places, which are others now."""
    return before + archive


def with_two_directories():
    """An archive whose end record names one directory by its place, and another by what lies before the record."""
    harmless, hidden = zipped("a/b.json", b"{}"), zipped("data/sample", pickle.dumps(3))
    end = harmless[-22:]
    return hidden[:-22] + harmless[:-22] + end


def with_wide_record(located):
    """An archive with a ZIP64 record, and a locator that points at `located` bytes from it."""
    archive = zipped("a/b.json", b"{}")
    count, _, size, start, _ = struct.unpack("<HHIIH", archive[-14:])
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, len(archive) - 22 + located, 1)
    return archive[:-22] + record + locator + archive[-22:]


TWO_WAYS = {
    "in front": shifted(zipped("a/b.json", b"{}"), b"#!/bin/sh\n"),
    "a pickle in front": shifted(zipped("a/b.json", b"{}"), pickle.dumps(3)),
    "an archive in front": shifted(zipped("a/b.json", b"{}"), zipped("data/sample", pickle.dumps(3))),
    "two directories": with_two_directories(),
    "a comment": zipped("a/b.json", b"{}")[:-2] + struct.pack("<H", 22) + zipped("a/b.json", b"{}")[-22:],
    "behind": zipped("a/b.json", b"{}") + b"\n",
    "an archive cut short": zipped("a/b.json", b"{}")[:-1],
    "a wide record elsewhere": with_wide_record(-8),
    "a wide record that says otherwise": with_wide_record(0)[:-10] + struct.pack("<IIH", 1, 2, 0),
}


@pytest.mark.parametrize("content", TWO_WAYS.values(), ids=TWO_WAYS.keys())
def test_an_archive_that_can_be_read_in_two_ways_is_refused(folder, content):
    write_sealed(folder, {"model.py": b"", "deep/weights": content})
    assert integrity.faults(folder) == ["deep/weights is an archive that can be read in two ways"]


def test_archives_as_they_are_written_have_one_directory(tmp_path):
    for content in (zipped("a/b.json", b"{}"), with_wide_record(0)):
        (tmp_path / "file").write_bytes(content)
        assert integrity.pickle_fault(tmp_path / "file") is None
    renamed = zipped("a/b.json", b"{}").replace(b"a/b.json", b"a/c.json", 1)  # another name before the content
    (tmp_path / "file").write_bytes(renamed)
    assert "cannot be read" in integrity.pickle_fault(tmp_path / "file")

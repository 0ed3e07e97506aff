"""Refusal of changed, missing and pickled files of a portable model."""

import io
import json
import pickle
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
    assert not integrity.holds_pickle(tmp_path / "file")

"""Whether a portable model is the one that was made, and holds no pickle; nothing in it is run to tell."""

import hashlib
import json
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

MANIFEST = "MANIFEST.json"
SUFFIXES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
"""Names under which pickles travel."""


def faults(folder: Path, sha256: str | None = None) -> list[str]:
    """Why a portable model cannot be trusted, file by file; empty if it can.

    Args:
        folder: with a manifest: of every other file size and SHA-256.
        sha256: of the manifest itself, where it is known.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        return [f"{MANIFEST} was changed"]
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    paths = {name: path for name, path in paths.items() if name != MANIFEST and "__pycache__" not in path.parts}
    told = dict.fromkeys(manifest.keys() - paths.keys(), "is missing")
    for name, path in paths.items():
        if name not in manifest:
            told[name] = "is not listed"
        elif path.is_symlink() or manifest[name] != _identity(path):
            told[name] = "was changed"
        elif holds_pickle(path):
            told[name] = "holds a pickle"
    return [f"{name} {fault}" for name, fault in sorted(told.items())]


def manifest_digest(folder: Path) -> str:
    """SHA-256 of a portable model's manifest, which stands for all of it."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def holds_pickle(path: Path) -> bool:
    """Whether a file is a pickle, an archive with one in it, or named as pickles are."""
    if path.suffix in SUFFIXES:
        return True
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return _is_pickle(file)
    with zipfile.ZipFile(path) as archive:
        for entry in (entry for entry in archive.infolist() if entry.file_size):
            with archive.open(entry) as file:
                if Path(entry.filename).suffix in SUFFIXES or _is_pickle(file):
                    return True
    return False


def _is_pickle(file: IO[bytes]) -> bool:
    """Whether there is a pickle at the start of a file, of protocol 2 or later as all are today."""
    start = file.read(2)
    if len(start) < 2 or start[0] != 0x80 or not 2 <= start[1] <= 5:
        return False
    try:
        file.seek(0)
        for _ in pickletools.genops(file):
            pass
    except Exception:  # weights that begin like one
        return False
    return True

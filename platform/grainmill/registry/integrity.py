"""Integrity of portable models: files are those of the manifest, and none is a pickle. Nothing of a model is run."""

import json
import pickletools
import zipfile
from pathlib import Path
from typing import IO

from grainmill.storage.files import digest, file_digest

MANIFEST = "MANIFEST.json"
SUFFIXES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
"""File name suffixes that are common for pickles."""


def faults(folder: Path, sha256: str | None = None) -> list[str]:
    """List the files of a portable model that cannot be trusted, each with the reason.

    Args:
        folder: the model; its manifest has the size and SHA-256 of every other file.
        sha256: digest of the manifest itself, where it is known.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    if sha256 is not None and digest(content) != sha256:
        return [f"{MANIFEST} was changed"]
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    paths = {name: path for name, path in paths.items() if name != MANIFEST and "__pycache__" not in path.parts}
    found = dict.fromkeys(manifest.keys() - paths.keys(), "is missing")
    for name, path in paths.items():
        if name not in manifest:
            found[name] = "is not listed"
        elif path.is_symlink() or manifest[name] != {"bytes": path.stat().st_size, "sha256": file_digest(path)}:
            found[name] = "was changed"
        elif holds_pickle(path):
            found[name] = "holds a pickle"
    return [f"{name} {fault}" for name, fault in sorted(found.items())]


def manifest_digest(folder: Path) -> str:
    """SHA-256 of a portable model's manifest, which identifies all files of the model."""
    return file_digest(folder / MANIFEST)


def holds_pickle(path: Path) -> bool:
    """Return True if a file is a pickle, is named like one, or is an archive that contains either."""
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
    """Return True if a file starts with a complete pickle of protocol 2 or later; older protocols have no mark."""
    start = file.read(2)
    if len(start) < 2 or start[0] != 0x80 or not 2 <= start[1] <= 5:
        return False
    try:
        file.seek(0)
        for _ in pickletools.genops(file):
            pass
    except Exception:  # other data can begin with the same two bytes
        return False
    return True

"""Integrity of registered models: files are as they were made, and none is a pickle. Nothing of a model is run.

A version's package has the portable model, whose files its manifest lists, and what MLflow keeps beside it.
"""

import json
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import IO

from grainmill.storage.files import digest, file_digest, folder_digest

MANIFEST = "MANIFEST.json"
_ADDED = ("registered_model_meta", "__pycache__")
"""Names of what MLflow and Python add to a package when they load it."""
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
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    paths = {name: path for name, path in paths.items() if name != MANIFEST and "__pycache__" not in path.parts}
    found = dict.fromkeys(manifest.keys() - paths.keys(), "is missing")
    for name, path in paths.items():
        if name not in manifest:
            found[name] = "is not listed"
        elif path.is_symlink() or manifest[name] != {"bytes": path.stat().st_size, "sha256": file_digest(path)}:
            found[name] = "was changed"
        elif fault := pickle_fault(path):
            found[name] = fault
    return [f"{name} {fault}" for name, fault in sorted(found.items())]


def manifest_digest(folder: Path) -> str:
    """SHA-256 of a portable model's manifest, which identifies all files of the model."""
    return file_digest(folder / MANIFEST)


def package_digest(folder: Path) -> str:
    """SHA-256 of all files of a version's package, such as `MLmodel` and the script that MLflow runs."""
    return folder_digest(folder, _ADDED)


def package_faults(folder: Path, sha256: str) -> list[str]:
    """List what cannot be trusted in a version's package, each with the reason; `sha256` is its known digest."""
    found = {path.relative_to(folder): "is a link" for path in folder.rglob("*") if path.is_symlink()}
    for path in (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        if fault := pickle_fault(path):
            found[path.relative_to(folder)] = fault
    if not found and package_digest(folder) != sha256:
        return ["a file beside the model was changed, added or lost"]
    return [f"{name} {fault}" for name, fault in sorted(found.items())]


def pickle_fault(path: Path) -> str | None:
    """Say that a file is a pickle, is named like one, or is an archive that holds either; None if it is none.

    An archive is refused, too, if another reader could take it for one with other entries.
    """
    if path.suffix in SUFFIXES:
        return "holds a pickle"
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\3\4"
        if not is_zip and not zipfile.is_zipfile(path):
            return "holds a pickle" if _is_pickle(file) else None
        if not is_zip or not _has_one_directory(file):
            return "is an archive that can be read in two ways"
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in (entry for entry in archive.infolist() if entry.file_size):
                with archive.open(entry) as content:
                    if Path(entry.filename).suffix in SUFFIXES or _is_pickle(content):
                        return "holds a pickle"
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return f"is an archive that cannot be read ({error})"
    return None


def _has_one_directory(file: IO[bytes]) -> bool:
    """Return True if the end of a ZIP file leaves no choice of its directory; readers choose differently.

    The directory must end where its end record begins, which must be last. A ZIP64 record must say the same. The
    stand-alone reader of a model has this rule in code of its own, as it imports nothing of Grainmill.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - 98))
    end = file.read().rjust(98, b"\0")  # 56 bytes of a ZIP64 record, 20 of its locator, 22 of the record of all ZIPs
    signature, length, start, comment = struct.unpack("<4s8xIIH", end[76:])
    place = size - 22
    if end[56:60] == b"PK\6\7":
        place = size - 98
        head, *wide, located = struct.unpack("<12s28xQQ8xQ4x", end[:76])
        if head != b"PK\6\6" + struct.pack("<Q", 44) or located != place:
            return False
        if [length, start] != [min(number, 2**32 - 1) for number in wide]:
            return False
        length, start = wide
    return signature == b"PK\5\6" and comment == 0 and start + length == place


def _is_pickle(file: IO[bytes]) -> bool:
    """Return True if a file starts with a complete pickle of protocol 2 or later; older protocols have no mark."""
    file.seek(0)
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

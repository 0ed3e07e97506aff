"""Lists of image files below a folder or among the keys of a bucket; what is left out has a reason.

All data of the method are listed here: folders of classes, corpora, benchmarks, images for a whitening. Nothing is
opened, so a pipe or a device holds nothing up. This module imports neither torch nor Pillow.
"""

import errno
import os
import stat
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from multigrain.errors import DataError

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff"),
        *(".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".avif"),
    }
)
"""Suffixes of image files that are read, in lower case."""
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
"""Suffixes of image files that are read if `pillow-heif` is installed."""
UNREAD_SUFFIXES = frozenset(
    {
        *(
            ".avifs",
            ".cur",
            ".dcm",
            ".dds",
            ".dib",
            ".emf",
            ".eps",
            ".exr",
            ".fit",
            ".fits",
            ".hdr",
            ".heics",
            ".icns",
            ".ico",
        ),
        *(".j2c", ".j2k", ".jls", ".jp2", ".jpc", ".jpf", ".jpm", ".jpx", ".jxl", ".jxr", ".pam", ".pcx", ".pdf"),
        *(".pfm", ".psb", ".psd", ".qoi", ".ras", ".sgi", ".svg", ".svgz", ".tga", ".wdp", ".wmf", ".xbm", ".xcf"),
        *(".xpm", ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".gpr", ".iiq", ".kdc", ".mef"),
        *(".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw"),
        *(".x3f",),
    }
)
"""Suffixes of image files that are not read."""
LITTER = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "@__thumb"),
        *("#recycle", "$recycle.bin", "system volume information", "lost+found"),
    }
)
"""Names of files and folders that systems leave behind, in lower case; names that begin with a dot are litter, too."""

OTHER = "is not an image, by its suffix"
LISTED = "is listed already under another name"
SPECIAL = "is neither a file nor a folder"
LOST = "is a link to nothing"
LOOP = "is a link that leads back to itself"


class Listing(NamedTuple):
    """Image files by their names, which are relative to the folder that was listed."""

    names: Sequence[str]
    """Sorted folder by folder."""
    left_out: Mapping[str, str]
    """Names of everything else with the reason: the predicate of a sentence, the same for all of a kind."""
    litter: int = 0
    """Number of hidden files and folders, and of those that systems leave behind."""

    @property
    def unread(self) -> dict[str, str]:
        """Return what was left out, except for files that are no images by their suffix."""
        return {name: reason for name, reason in self.left_out.items() if reason != OTHER}


def by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """Group the names of what was left out by the reason."""
    found: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        found.setdefault(reason, []).append(name)
    return found


def is_litter(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in LITTER


def fault_of_name(name: str) -> str | None:
    """Return why a file is not read, by its suffix; None if it is."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES:
        return None
    if suffix in HEIF_SUFFIXES:
        return None if find_spec("pillow_heif") else f"is a {suffix} file, which needs the package pillow-heif"
    return f"is a {suffix} file, which is not read; save it as JPEG or PNG" if suffix in UNREAD_SUFFIXES else OTHER


def list_images(root: Path, deep: bool = True, only: Sequence[str] = ("",)) -> Listing:
    """List the image files in a folder, none if there is no such folder.

    A link is followed, unless it leads to a folder or file that is listed already. Files and folders in their own
    place come first, links in the order of their names after them.

    Args:
        root: the folder.
        deep: include the files in subfolders.
        only: names of the folders in `root` to list, instead of all.
    Raises:
        DataError: one of these folders may not be read.
    """
    walk = _Walk(os.fspath(root), deep)
    for name in only:
        try:
            walk.enter(name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            rule = "a folder of images must be readable"
            raise DataError([f"{rule}, but {root / name} is not ({error.strerror}); change its permissions"]) from error
    walk.follow_links()
    return _sorted(walk.names, walk.left_out, walk.litter)


def list_by_folder(root: Path, folders: Sequence[str]) -> tuple[dict[str, list[Path]], Listing]:
    """List the image files in some folders below `root`, each file once: folder -> its images, and the whole listing.

    Args:
        root: the folder above them.
        folders: paths relative to it, all of one depth.
    Raises:
        DataError: a folder may not be read.
    """
    listing = list_images(root, only=folders)
    found: dict[str, list[Path]] = {folder: [] for folder in folders}
    for name in listing.names:
        found["/".join(name.split("/")[: folders[0].count("/") + 1])].append(root / name)
    return found, listing


def list_folders(root: Path) -> list[str]:
    """List the names of the folders in a folder, sorted; none if there is no such folder."""
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if not is_litter(path.name) and path.is_dir())


def list_keys(keys: Iterable[str]) -> Listing:
    """List the images among the keys of a bucket, by the rules for names of files."""
    names, left_out, litter = [], {}, 0
    for key in keys:
        if key.endswith("/"):  # an object that stands for a folder
            continue
        if any(is_litter(part) for part in key.split("/")):
            litter += 1
        elif fault := fault_of_name(key):
            left_out[key] = fault
        else:
            names.append(key)
    return _sorted(names, left_out, litter)


def _sorted(names: Iterable[str], left_out: Mapping[str, str], litter: int) -> Listing:
    in_order = sorted(left_out, key=_parts)
    return Listing(sorted(names, key=_parts), {name: left_out[name] for name in in_order}, litter)


def _parts(name: str) -> list[str]:
    return name.split("/")


_Identity = tuple[int, int]
"""Device and inode of a file or folder."""


class _Walk:
    """Walks through a folder, and collects the names of what it finds."""

    def __init__(self, root: str, deep: bool) -> None:
        self.root, self.deep = root, deep
        self.names: list[str] = []
        self.left_out: dict[str, str] = {}
        self.litter = 0
        self._links: list[str] = []
        self._folders: set[_Identity] = set()

    def enter(self, folder: str) -> None:
        """Collect what lies in a folder and the folders below it; links wait. Raises OSError if it cannot be listed."""
        waiting = self._collect(folder)
        while waiting:
            below = waiting.pop()
            try:
                waiting += self._collect(below)
            except OSError as error:
                self.left_out[below] = f"cannot be listed ({error.strerror})"

    def _collect(self, folder: str) -> list[str]:
        """Collect the names in a folder; return its subfolders."""
        place = os.path.join(self.root, folder)
        if (identity := _identity(os.stat(place))) in self._folders:
            self.left_out[folder] = LISTED
            return []
        with os.scandir(place) as entries:
            found = list(entries)
        self._folders.add(identity)
        folders = []
        for entry in found:
            name = os.path.join(folder, entry.name)
            if is_litter(entry.name):
                self.litter += 1
            elif entry.is_symlink():
                self._links.append(name)
            elif entry.is_dir():
                folders.append(name)
            elif entry.is_file():
                self._keep(name)
            else:
                self.left_out[name] = SPECIAL
        return folders if self.deep else []

    def _keep(self, name: str) -> None:
        if fault := fault_of_name(name):
            self.left_out[name] = fault
        else:
            self.names.append(name)

    def follow_links(self) -> None:
        """Collect what the links lead to: folders first, and links below them, too."""
        files: list[tuple[str, _Identity]] = []
        while self._links:
            links, self._links = sorted(self._links, key=_parts), []
            for name in links:
                try:
                    target = os.stat(os.path.join(self.root, name))
                    if stat.S_ISDIR(target.st_mode) and self.deep:
                        self.enter(name)
                except OSError as error:
                    self.left_out[name] = _fault_of_link(error)
                    continue
                if stat.S_ISREG(target.st_mode):
                    files.append((name, _identity(target)))
                elif not stat.S_ISDIR(target.st_mode):
                    self.left_out[name] = SPECIAL
        if files:
            self._keep_once(files)

    def _keep_once(self, files: Iterable[tuple[str, _Identity]]) -> None:
        """Collect links to files, unless the file is listed already."""
        known = set()
        for name in self.names:
            with suppress(OSError):  # it is gone, which shows when it is read
                known.add(_identity(os.lstat(os.path.join(self.root, name))))
        for name, identity in sorted(files):
            if fault_of_name(name) is None:
                if identity in known:
                    self.left_out[name] = LISTED
                    continue
                known.add(identity)
            self._keep(name)


def identity(path: Path) -> Hashable:
    """Return a value that is the same for all spellings of a file and links to it; None if it is no regular file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return os.path.realpath(path) if status.st_nlink > 1 else _identity(status)  # names of one inode are files, too


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _fault_of_link(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return LOST
        case errno.ELOOP:
            return LOOP
    return f"cannot be followed ({error.strerror})"

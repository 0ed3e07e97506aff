"""Files of a job: which travel to a cluster and which stay, and the folder that is sent."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import Distribution, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from grainmill.errors import SubmissionError
from grainmill.storage.provenance import CARRIED, commit
from grainmill.trainable import Trainable

LIMIT_BYTES = 100 * 2**20
"""Maximum size of a job's files. Ray accepts several times as much, but code is never that large."""
STAYS = (".*", "__pycache__", "*.egg-info", "grainmill-runs", "mlruns")
"""Patterns of files and folders that are not sent: repositories, environments, caches and runs."""
NO_CODE = "is no code"
"""Reason why those are not sent."""
SECRET = "may hold keys or credentials, by its name"  # noqa: S105
SOURCE_ROOTS = ("platform", "trainables")
"""Folders of the job for Grainmill and for the trainable; neither holds an `__init__.py`."""
_WORDS = (
    "credential|secret|passw(or)?d|passphrase|netrc|pgpass|kube.?config|docker.?(config|cfg)|service.?account"
    "|(api|access|private|root)[._-]?key|pypirc|npmrc|s3cfg|rclone|tfstate"
)
_SECRET_FOLDER = re.compile(f".*({_WORDS}).*|(.*[._-])?keys|private|certs|ssh|aws|gcloud|gnupg|kube")
_SECRET_FILE = re.compile(
    rf".*({_WORDS}).*|(.*\.)?env(\..*)?|(.*[._-])?(rsa|dsa|ecdsa|ed25519)([._-].*)?|(.*[._-])?token(\.[a-z]+)?"
    r"|(.*[._-])?keys?(\.(txt|json|ya?ml|ini|cfg|bak))?|auth(\.[a-z]+)?|my\.cnf"
    r"|.*\.(pem|key|p8|p12|pfx|jks|keystore|keytab|ppk|kdbx|der|gpg|pgp|asc|ovpn|tfvars|boto)"
)
"""Usual names of what holds keys and credentials, in lower case."""
_SECRET_CONTENT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY|PuTTY-User-Key-File|aws_secret_access_key|client.key.data|client_secret",
    re.IGNORECASE,
)
_CODE = (".py", ".pyi", ".so")
"""Suffixes of code, which travels by any name."""


class JobFiles(NamedTuple):
    """Files that travel with a job, and files that stay."""

    sent: dict[Path, Path]
    """Path in the job's folder -> file on this machine."""
    left_out: dict[str, str]
    """Path of a file or folder that stays -> the reason, a predicate."""

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(path.stat().st_size for path in self.sent.values())


def list_job(file: Path, trainable: Trainable) -> JobFiles:
    """List an experiment file, Grainmill and the trainable's top-level package. Links are followed inside a package.

    Args:
        file: the experiment file.
        trainable: its module.
    Raises:
        SubmissionError: the files exceed `LIMIT_BYTES`; names the largest.
    """
    top = sys.modules[trainable.__name__.partition(".")[0]]  # type: ignore[attr-defined]
    job = JobFiles({Path(file.name): file}, {})
    for root, module in zip(SOURCE_ROOTS, (sys.modules["grainmill"], top), strict=True):
        source = _source(module)
        if source.is_file():
            job.sent[Path(root, source.name)] = source
        else:
            _add(job, source.resolve(), source.resolve(), Path(root, source.name), ())
    if (total := job.bytes) > LIMIT_BYTES:
        largest = sorted(job.sent.values(), key=lambda path: -path.stat().st_size)[:3]
        listed = ", ".join(f"{path} ({megabytes(path.stat().st_size)})" for path in largest)
        raise SubmissionError(
            f"a job must be at most {megabytes(LIMIT_BYTES)}, got {megabytes(total)}: {listed}; "
            "keep data out of the package, where all nodes see them"
        )
    return job


def _source(module: ModuleType) -> Path:
    """Return the folder of a package, or the file of a module."""
    return Path(next(iter(module.__path__)) if hasattr(module, "__path__") else str(module.__file__))


def _add(job: JobFiles, package: Path, folder: Path, target: Path, above: tuple[Path, ...]) -> None:
    """Add the content of a folder to a job.

    Args:
        package: folder of the whole package, without links in its path.
        folder: the folder, without links in its path.
        target: its path in the job's folder.
        above: the folders that led here, without links in their paths.
    """
    for entry in sorted(folder.iterdir()):
        place, name = Path(os.path.realpath(entry)), target / entry.name
        fault = "leads back to itself" if place in (folder, *above) else _fault(package, entry.name, place)
        if fault:
            job.left_out[str(name)] = fault
        elif place.is_dir():
            _add(job, package, place, name, (*above, folder))
        else:
            job.sent[name] = place


def _fault(package: Path, name: str, place: Path) -> str | None:
    """Return why an entry of a package stays; None if it travels. `place` is its path without links."""
    if not place.is_relative_to(package):
        return "is a link out of the package"
    *folders, last = place.relative_to(package).parts
    if any(fnmatch(one, pattern) for one in (*folders, last, name) for pattern in STAYS):
        return NO_CODE
    code, form = place.suffix in _CODE, _SECRET_FOLDER if place.is_dir() else _SECRET_FILE
    tests = [*((_SECRET_FOLDER, one) for one in folders), *((form, one) for one in (last, name) if not code)]
    if any(test.fullmatch(one.lower()) for test, one in tests):
        return SECRET
    if not place.is_file():
        return None if place.is_dir() else "is neither a file nor a folder"
    try:
        with place.open("rb") as content:
            return "holds a key" if _SECRET_CONTENT.search(content.read(2**16)) and not code else None
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def write_job(job: JobFiles, name: str, folder: Path) -> None:
    """Write the files of a job, the metadata of its packages and the commit to a new folder.

    Args:
        name: the trainable's name in the experiment file.
    """
    for target, path in job.sent.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / target)
    for installed in _distributions(name):
        _copy_metadata(installed, folder / SOURCE_ROOTS[0])
    (folder / CARRIED).write_text(json.dumps(commit()))


def _distributions(name: str) -> Iterator[Distribution]:
    """Yield the distributions of Grainmill and of an installed trainable, whose entry points name the trainables."""
    try:
        yield distribution("grainmill")
    except PackageNotFoundError:  # Grainmill runs from its source; the trainable is then a dotted path
        return
    for entry in entry_points(group="grainmill.trainables", name=name):
        if entry.dist is not None and entry.dist.name != "grainmill":
            yield entry.dist


def _copy_metadata(installed: Distribution, root: Path) -> None:
    """Write a distribution's metadata below a source root, so that its entry points are found there."""
    place = root / f"{installed.name.replace('-', '_')}-{installed.version}.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    metadata = installed.read_text("METADATA") or installed.read_text("PKG-INFO")  # a source tree has PKG-INFO
    (place / "METADATA").write_text(metadata or "")
    (place / "entry_points.txt").write_text(installed.read_text("entry_points.txt") or "")


def megabytes(count: int) -> str:
    """Format a number of bytes in MiB."""
    return f"{count / 2**20:.1f} MiB"

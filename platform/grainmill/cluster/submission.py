"""A job for a Ray cluster: what travels there, under which name, and the `ray job submit` that starts it."""

import ipaddress
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.metadata import Distribution, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from grainmill.config.experiment import Experiment
from grainmill.errors import SubmissionError, hidden
from grainmill.storage import workspace
from grainmill.storage.provenance import CARRIED, commit
from grainmill.trainable import Trainable

LIMIT_BYTES = 100 * 2**20
"""Of all that is sent. Ray takes a few times as much, but what is larger is no code."""
STAYS = (".*", "__pycache__", "*.egg-info", "grainmill-runs", "mlruns")
"""Names of files and folders that are not sent: repositories, environments, caches and runs."""
SOURCE_ROOTS = ("platform", "trainables")
"""Folders of the job, for the mill and for what it trains; neither holds an `__init__.py`."""
SECONDS = 10
"""Within which a head must answer."""


@dataclass(frozen=True)
class JobPackage:
    """What is sent."""

    folder: Path
    """Holds it all; the job's working directory."""
    files: int
    bytes: int
    left_out: Mapping[str, int]
    """Names in `STAYS` that were met, and how often."""


def connect(address: str) -> JobSubmissionClient:
    """The client of a cluster.

    Raises:
        SubmissionError: no head answers there, it does not take the token, it takes anybody's jobs from anywhere, or
            its Ray is another one.
    """
    place = urlsplit(address)
    if place.scheme not in ("http", "https") or not place.hostname or "@" in place.netloc:
        rule = "a cluster must be named by the address of its dashboard, such as http://head:8265"
        raise SubmissionError(f"{rule}, got {hidden(address)}; correct --address")
    if _is_open(address) and not _is_loopback(place.hostname):
        raise SubmissionError(
            f"a cluster must ask for a token, but whoever reaches {address} can run any code there; "
            "start its head with RAY_AUTH_MODE=token, or let only this machine reach it, through a tunnel to 127.0.0.1"
        )
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        came = "was wrong" if "Authentication failed" in str(error) else "is missing"
        raise SubmissionError(
            f"the cluster at {address} asks for its token, but that {came}; "
            "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, a file with the token of the cluster"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise SubmissionError(f"{address} must be the dashboard of a Ray cluster, but said: {error}") from error
    if (theirs := client._server_ray_version) != ray.__version__:
        raise SubmissionError(
            f"a cluster must have the Ray of this command, {ray.__version__}, but the head at {address} has {theirs}; "
            "install that one here, or this one there"
        )
    return client


def _is_open(address: str) -> bool:
    """Whether a head answers a stranger."""
    place = urlsplit(address)
    connection = (HTTPSConnection if place.scheme == "https" else HTTPConnection)(place.netloc, timeout=SECONDS)
    try:
        connection.request("GET", "/api/version")
        return connection.getresponse().status == 200
    except (OSError, HTTPException) as error:
        raise SubmissionError(
            f"the head of a Ray cluster must answer at {address}, but did not: {error}; is it running, and does the "
            "tunnel to its dashboard stand?"
        ) from error
    finally:
        connection.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def next_submission_id(client: JobSubmissionClient, address: str, name: str) -> str:
    """`grainmill-NAME-1`, `-2`, ...: the first that no job of the cluster has.

    Raises:
        SubmissionError: a job of this name is not at its end.
    """
    form, last = _form(name), 0
    for job in client.list_jobs():
        if found := form.fullmatch(job.submission_id or ""):
            if not job.status.is_terminal():
                raise SubmissionError(
                    f"one job at a time works under a name, but {job.submission_id} is {job.status.lower()}; "
                    f"wait for it, stop it, or choose another --set name=NAME\n"
                    + job_commands(address, job.submission_id)
                )
            last = max(last, int(found[1]))
    return f"grainmill-{name}-{last + 1}"


def _form(name: str) -> re.Pattern[str]:
    return re.compile(rf"grainmill-{re.escape(name)}-(\d+)")


def delete_old_packages(jobs: Path, name: str) -> None:
    """Delete the packages of earlier jobs of a name. All these jobs must have ended; see `next_submission_id`."""
    for folder in jobs.glob("grainmill-*"):
        if _form(name).fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def job_status(client: JobSubmissionClient, job: str) -> JobStatus:
    """Where a job stands.

    Raises:
        SubmissionError: the head does not know it, or is gone.
    """
    try:
        return client.get_job_status(job)
    except (OSError, RuntimeError) as error:
        raise SubmissionError(
            f"the cluster must know {job}, but said: {error}; submit it again: what was done is not done twice"
        ) from error


def job_commands(address: str, job: str) -> str:
    """How to follow a job and how to stop it."""
    ray = Path(sys.executable).with_name("ray")
    return "\n".join(
        f"{what:9} {ray} job {verb} --address {address} {job}"
        for what, verb in (("follow", "logs --follow"), ("state", "status"), ("stop", "stop"))
    )


def check_storage(experiment: Experiment) -> None:
    """Refuse a storage folder that would vanish with the job.

    Raises:
        SubmissionError: it is relative: to the job's own folder, which is deleted at its end.
    """
    if not workspace.remote(experiment.storage) and not Path(experiment.storage).is_absolute():
        raise SubmissionError(
            "storage must be an absolute path that all nodes see and that outlives the job, or s3://bucket/prefix, "
            f"got {experiment.storage!r}; name one, for example --set storage=/shared/grainmill-runs"
        )


def package_job(file: Path, name: str, trainable: Trainable, folder: Path) -> JobPackage:
    """Put an experiment file, the mill and a trainable's top-level package into a new folder.

    Args:
        file: lies there under its own name, whatever its folder was.
        name: of the trainable in the file.
        trainable: its module.
        folder: where to.
    Raises:
        SubmissionError: it is more than `LIMIT_BYTES`; with the largest files.
    """
    top = sys.modules[trainable.__name__.partition(".")[0]]  # type: ignore[attr-defined]
    left_out: Counter[str] = Counter()
    found = {Path(file.name): file}
    for root, module in zip(SOURCE_ROOTS, (sys.modules["grainmill"], top), strict=True):
        source = _source(module)
        found |= {Path(root) / source.name / one: source / one for one in _walk(source, left_out)}
    sizes = {path: path.stat().st_size for path in found.values()}
    if (total := sum(sizes.values())) > LIMIT_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        told = ", ".join(f"{path} ({megabytes(sizes[path])})" for path in largest)
        raise SubmissionError(
            f"a job must be at most {megabytes(LIMIT_BYTES)}, got {megabytes(total)}: {told}; "
            "keep data out of the package, where all nodes see them"
        )
    for target, path in found.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / target)
    for one in _distributions(name):
        _announce(one, folder / SOURCE_ROOTS[0])
    (folder / CARRIED).write_text(json.dumps(commit()))
    return JobPackage(folder, len(found), total, left_out)


def _source(module: ModuleType) -> Path:
    """A package's folder, or the file of a module that is none."""
    return Path(next(iter(module.__path__)) if hasattr(module, "__path__") else str(module.__file__))


def _walk(source: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The files of a folder that are sent, relative to it; of a file, itself."""
    if source.is_file():
        yield Path()
        return
    for path in sorted(source.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in STAYS):
            left_out[path.name] += 1
        else:
            yield from (Path(path.name) / one for one in _walk(path, left_out))


def _distributions(name: str) -> Iterator[Distribution]:
    """Of the mill and of an installed trainable: they hold the names by which trainables are found."""
    try:
        yield distribution("grainmill")
    except PackageNotFoundError:  # it runs from its source; a trainable is then a dotted path
        return
    for entry in entry_points(group="grainmill.trainables", name=name):
        if entry.dist is not None and entry.dist.name != "grainmill":
            yield entry.dist


def _announce(installed: Distribution, root: Path) -> None:
    """Make a distribution known below a source root, as if it were installed there."""
    place = root / f"{installed.name.replace('-', '_')}-{installed.version}.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    told = installed.read_text("METADATA") or installed.read_text("PKG-INFO")  # a source tree's has the other name
    (place / "METADATA").write_text(told or "")
    (place / "entry_points.txt").write_text(installed.read_text("entry_points.txt") or "")


def megabytes(count: int) -> str:
    """A size in words."""
    return f"{count / 2**20:.1f} MiB"


def submit_command(
    address: str, job: str, packed: JobPackage, verb: str, file: Path, overrides: Sequence[str]
) -> list[str]:
    """The `ray job submit` that starts a job, word by word."""
    environment = {"env_vars": {"PYTHONPATH": ":".join(SOURCE_ROOTS)}}  # relative to the working directory
    return [
        *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address, "--submission-id", job),
        *("--working-dir", str(packed.folder), "--runtime-env-json", json.dumps(environment)),
        *("--", "python", "-m", "grainmill", verb, file.name),
        *(word for one in overrides for word in ("--set", one)),
    ]

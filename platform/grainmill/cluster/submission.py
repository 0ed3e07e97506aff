"""Submission of a job to a Ray cluster: its head, its id, and the `ray job submit` command."""

import ipaddress
import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from grainmill.cluster import ray_private
from grainmill.cluster.job_files import SOURCE_ROOTS
from grainmill.config.addresses import hidden
from grainmill.config.experiment import Experiment
from grainmill.errors import SubmissionError
from grainmill.storage import workspace

SECONDS = 10
"""Time in seconds within which a head must answer."""


def connect(address: str) -> JobSubmissionClient:
    """Open a client for the jobs of a cluster.

    Raises:
        SubmissionError: no head answers, it refuses the token, it accepts jobs from anybody on the network, or it runs
            another version of Ray.
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
        reason = "was wrong" if "Authentication failed" in str(error) else "is missing"
        raise SubmissionError(
            f"the cluster at {address} asks for its token, but that {reason}; "
            "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, a file with the token of the cluster"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise SubmissionError(f"{address} must be the dashboard of a Ray cluster, but said: {error}") from error
    if (theirs := ray_private.server_version(client)) != ray.__version__:
        raise SubmissionError(
            f"a cluster must have the Ray of this command, {ray.__version__}, but the head at {address} has {theirs}; "
            "install that one here, or this one there"
        )
    return client


def _is_open(address: str) -> bool:
    """Return True when a head answers a request without a token."""
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
    """Return the first id of `grainmill-NAME-1`, `-2`, ... above all that the cluster knows.

    Raises:
        SubmissionError: a job of this name has not ended.
    """
    pattern, last = _id_pattern(name), 0
    for job in client.list_jobs():
        if found := pattern.fullmatch(job.submission_id or ""):
            if not job.status.is_terminal():
                raise SubmissionError(
                    f"one job at a time works under a name, but {job.submission_id} is {job.status.lower()}; "
                    "wait for it, stop it, or choose another --set name=NAME\n"
                    + job_commands(address, job.submission_id)
                )
            last = max(last, int(found[1]))
    return f"grainmill-{name}-{last + 1}"


def _id_pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"grainmill-{re.escape(name)}-(\d+)")


def delete_old_packages(jobs: Path, name: str) -> None:
    """Delete the packages of a name's earlier jobs. All of them must have ended; see `next_submission_id`."""
    for folder in jobs.glob("grainmill-*"):
        if _id_pattern(name).fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def job_status(client: JobSubmissionClient, job: str) -> JobStatus:
    """Return the status of a job.

    Raises:
        SubmissionError: the head does not know the job, or does not answer.
    """
    try:
        return client.get_job_status(job)
    except (OSError, RuntimeError) as error:
        raise SubmissionError(
            f"the cluster must know {job}, but said: {error}; submit it again: what was done is not done twice"
        ) from error


def job_commands(address: str, job: str) -> str:
    """List the commands that follow a job, show its state and stop it, one a line."""
    ray = str(Path(sys.executable).with_name("ray"))
    return "\n".join(
        f"{what:9} {shlex.join([ray, 'job', *verb, '--address', address, job])}"
        for what, *verb in (("follow", "logs", "--follow"), ("state", "status"), ("stop", "stop"))
    )


def check_storage(experiment: Experiment) -> None:
    """Refuse a storage folder that would vanish with the job.

    Raises:
        SubmissionError: the path is relative, that is, inside the job's folder, which is deleted at the end.
    """
    if not workspace.is_remote(experiment.storage) and not Path(experiment.storage).is_absolute():
        raise SubmissionError(
            "storage must be an absolute path that all nodes see and that outlives the job, or s3://bucket/prefix, "
            f"got {experiment.storage!r}; name one, for example --set storage=/shared/grainmill-runs"
        )


def submit_command(address: str, job: str, folder: Path, verb: str, file: Path, overrides: Sequence[str]) -> list[str]:
    """Return the words of the `ray job submit` command that starts a job."""
    environment = {"env_vars": {"PYTHONPATH": ":".join(SOURCE_ROOTS)}}  # relative to the working directory
    return [
        *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address, "--submission-id", job),
        *("--working-dir", str(folder), "--runtime-env-json", json.dumps(environment)),
        *("--", "python", "-m", "grainmill", verb, file.name),
        *(word for one in overrides for word in ("--set", one)),
    ]

"""Drain the Ray node of a spot instance when AWS announces its end, so that its trials are saved and go on elsewhere.

Runs on every worker node, and needs only Python and the command `ray`. AWS announces the end two minutes before.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

import argparse
import json
import subprocess
import time
from contextlib import closing
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException

METADATA = "169.254.169.254"
POLL_SECONDS = 5.0
"""Interval in seconds between two requests, as AWS recommends."""


def end(metadata: str) -> datetime | None:
    """Return the time when the instance ends, or None while nothing is announced.

    Raises:
        OSError, ValueError, HTTPException: the metadata service does not answer as specified.
    """
    with closing(HTTPConnection(metadata, timeout=5)) as service:
        service.request("PUT", "/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        token = service.getresponse().read().decode()
        service.request("GET", "/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token})
        answer = service.getresponse()
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise OSError(f"status {answer.status}")
        return datetime.fromisoformat(json.load(answer)["time"])


def drain(seconds: int) -> bool:
    """Tell Ray that this node ends in `seconds`. Returns True when Ray has accepted that."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "AWS takes the spot instance away"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    return subprocess.run(command, check=False).returncode == 0


def main() -> None:
    """Wait for the announcement, and pass it on until Ray has accepted it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--metadata", default=METADATA, help="host and port of the instance metadata service")
    parser.add_argument("--poll", type=float, default=POLL_SECONDS, help="seconds between two requests")
    options = parser.parse_args()
    while True:
        try:
            announced = end(options.metadata)
        except (OSError, ValueError, HTTPException) as error:
            print(f"{options.metadata} does not answer as it should: {error}", flush=True)
            announced = None
        if announced:
            left = max(0, int((announced - datetime.now(UTC)).total_seconds()))
            print(f"this instance ends at {announced}, in {left} s", flush=True)
            if drain(left):
                return
        time.sleep(options.poll)


if __name__ == "__main__":
    main()

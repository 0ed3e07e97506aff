"""Two simulated hosts on this machine, joined by a cable: network namespaces that only their own processes see."""

import os
import subprocess
import sys
from pathlib import Path

INSIDE = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""Prefix of a command that runs on a host of its own. When it ends, all processes that it started end, too."""
ADDRESSES = "192.168.77.1", "192.168.77.2"
CARDS = "east", "west"
"""Names of the hosts' network interfaces."""
THERE = ["ip", "netns", "exec", "there"]
"""Prefix of a command that runs on the second host."""


def run(*words):
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def join():
    """Make the second host and the cable to it, from the first. No route leads out of the two."""
    run("mount", "-t", "tmpfs", "tmpfs", "/run")  # where `ip` keeps the names of namespaces
    own = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray")
    own.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "tmpfs", str(own))  # or this Ray would see others of this machine
    run("ip", "netns", "add", "there")
    run("ip", "link", "add", CARDS[0], "type", "veth", "peer", "name", CARDS[1], "netns", "there")
    for prefix, card, own, other in (([], CARDS[0], *ADDRESSES), (THERE, CARDS[1], *ADDRESSES[::-1])):
        run(*prefix, "ip", "address", "add", f"{own}/24", "dev", card)
        run(*prefix, "ip", "link", "set", card, "up")
        run(*prefix, "ip", "link", "set", "lo", "up")
        run(*prefix, "ip", "route", "add", "default", "via", other)  # by which a host finds out its own address


def permitted():
    """Return True if this machine permits such namespaces."""
    code = "import hosts; hosts.join()"
    command = [*INSIDE, sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    try:
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def crossed():
    """Return the numbers of bytes received and sent through the cable."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith(CARDS[0])]
    numbers = line.partition(":")[2].split()
    return int(numbers[0]), int(numbers[8])


def start(cpus):
    """Start a cluster with one Ray node on each host, and connect this process to it. Called after `join`.

    Args:
        cpus: CPUs of the first and the second node.
    """
    import ray
    from ray.cluster_utils import Cluster

    store = 128 * 2**20
    head = {
        "node_ip_address": ADDRESSES[0],
        "num_cpus": cpus[0],
        "object_store_memory": store,
        "include_dashboard": True,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--address", cluster.address]
    command += ["--node-ip-address", ADDRESSES[1], "--num-cpus", str(cpus[1]), "--object-store-memory", str(store)]
    run(*THERE, *command, "--disable-usage-stats")
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2

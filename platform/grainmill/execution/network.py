"""Network between the workers of a group: the interface that has the node's own address."""

import os
from dataclasses import dataclass, replace

import psutil
import ray
from ray.train.torch import TorchConfig

from grainmill.cluster import hardware


def interface(address: str) -> str | None:
    """Return the name of this machine's network interface with an address; None if there is none."""
    for name, entries in psutil.net_if_addrs().items():
        if address in (entry.address for entry in entries):
            return str(name)
    return None


def choose_interface() -> None:
    """Make Gloo and NCCL use the interface of this node's address, unless the user has named one.

    By default, Gloo takes the address of the host name, often 127.0.0.1, which other nodes cannot reach. NCCL takes the
    first interface that suits it.
    """
    if name := interface(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without `=`, eth1 also matches eth10


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group, backend_config):  # type: ignore[no-untyped-def]
        worker_group.execute(choose_interface)
        if any(worker_group.execute(hardware.lacks_gpu)):  # then NCCL cannot start; the workers will say why
            backend_config = replace(backend_config, backend="gloo")
        super().on_start(worker_group, backend_config)


@dataclass
class Network(TorchConfig):  # type: ignore[misc]
    """Ray Train's process group of torch, on the interface that `choose_interface` selects on each node."""

    @property
    def backend_cls(self) -> type:
        """Backend that sets up the process group."""
        return _Backend

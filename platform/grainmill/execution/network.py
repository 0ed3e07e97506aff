"""Over which network the workers of a group talk to each other: that of the nodes' own addresses."""

import os
from dataclasses import dataclass

import psutil
import ray
from ray.train.torch import TorchConfig


def interface(address: str) -> str | None:
    """Name of the network interface of this machine that has an address; None if none has."""
    for name, found in psutil.net_if_addrs().items():
        if address in (one.address for one in found):
            return str(name)
    return None


def choose() -> None:
    """Have Gloo and NCCL use the interface of this node's address, unless the user has named one.

    Gloo takes what the machine's name stands for otherwise, often 127.0.0.1, where other nodes find nobody; NCCL the
    first interface that it likes.
    """
    if name := interface(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without `=`, eth1 stands for eth10, too


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group, backend_config):  # type: ignore[no-untyped-def]
        worker_group.execute(choose)
        super().on_start(worker_group, backend_config)


@dataclass
class Network(TorchConfig):  # type: ignore[misc]
    """Ray Train's process group of torch, on the interface that `choose` finds on each node."""

    @property
    def backend_cls(self) -> type:
        """What sets it up."""
        return _Backend

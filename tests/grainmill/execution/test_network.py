"""Which interface the workers of a group use."""

import os
import socket

import pytest
import ray

from grainmill.execution import network


def test_interface_is_that_of_the_address():
    assert network.interface("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert network.interface("192.0.2.77") is None  # nobody's


@pytest.fixture
def chosen(monkeypatch):
    """What `choose` makes of the variables, on a node of an address."""

    def choose(address, **given):
        monkeypatch.setattr(os, "environ", given)
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
        network.choose_interface()
        return given.get("GLOO_SOCKET_IFNAME"), given.get("NCCL_SOCKET_IFNAME")

    return choose


def test_gloo_and_nccl_use_the_interface_of_the_nodes_address(chosen):
    loopback = network.interface("127.0.0.1")
    assert chosen("127.0.0.1") == (loopback, f"={loopback}")


def test_what_the_user_says_holds(chosen):
    loopback = network.interface("127.0.0.1")
    assert chosen("127.0.0.1", NCCL_SOCKET_IFNAME="ib") == (loopback, "ib")
    assert chosen("127.0.0.1", GLOO_SOCKET_IFNAME="eth7") == ("eth7", f"={loopback}")


def test_address_of_no_interface_changes_nothing(chosen):
    assert chosen("192.0.2.77") == (None, None)

"""Ports for launchers: free, and none that the system gives to connections meanwhile."""

import socket
from pathlib import Path

import pytest

from dora_core.engine import distributed

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_a_port_is_free_and_none_of_those_that_the_system_gives_away(monkeypatch):
    low = int(RANGE.read_text().split()[0]) if RANGE.is_file() else 0
    if low < distributed.FIRST_PORT + 100:
        pytest.skip("the system gives all ports to connections, or does not say which")
    ports = {distributed.free_port() for _ in range(20)}
    assert all(distributed.FIRST_PORT <= port < low for port in ports)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port := ports.pop()))
        monkeypatch.setattr(distributed, "FIRST_PORT", port)
        monkeypatch.setattr(distributed.random, "SystemRandom", lambda: distributed.random)  # drawn in order
        monkeypatch.setattr(distributed.random, "sample", lambda choices, number: list(choices)[:number])
        assert port < distributed.free_port() < low


def test_where_no_such_port_is_free_the_system_chooses(monkeypatch):
    monkeypatch.setattr(distributed, "FIRST_PORT", 70000)  # none are left below the system's
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", distributed.free_port()))

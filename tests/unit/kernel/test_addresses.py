"""Hosts and ports, IPv6 included."""

from __future__ import annotations

import pytest

from llmos.addresses import host_port, is_loopback, is_wildcard


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert not is_wildcard(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.1", "example.org", "", "localhost.example.org"])
def test_everything_else_is_reachable_from_outside(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_wildcards(host: str) -> None:
    assert is_wildcard(host)


@pytest.mark.parametrize(
    ("host", "written"), [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7"), ("[::1]", "[::1]:7"), ("a.b", "a.b:7")]
)
def test_host_and_port(host: str, written: str) -> None:
    assert host_port(host, 7) == written

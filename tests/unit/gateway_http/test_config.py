"""Where a gateway may listen."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import GatewayConfig
from llmos.addresses import is_loopback
from llmos.config import TlsConfig, load
from llmos.errors import ConfigError

TLS = TlsConfig(Path("ca.pem"), Path("cert.pem"), Path("key.pem"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    assert is_loopback(host)
    assert GatewayConfig(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_elsewhere_needs_keys_and_tls(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="llmos keys add"):
        GatewayConfig(host=host, tls=TLS)
    with pytest.raises(ConfigError, match="llmos certs"):
        GatewayConfig(host=host, keys_file=Path("keys.json"))
    assert GatewayConfig(host=host, keys_file=Path("keys.json"), tls=TLS).host == host


def test_a_gateway_needs_a_scheduler() -> None:
    with pytest.raises(ConfigError):
        GatewayConfig(schedulers=())


def test_limits_can_be_set_from_outside() -> None:
    environ = {"LLMOS_GATEWAY_LIMITS_MAX_BODY_BYTES": "100", "LLMOS_GATEWAY_SCHEDULERS": "a:1,b:2"}
    config = load(GatewayConfig, "gateway", environ=environ)
    assert config.limits.max_body_bytes == 100
    assert config.schedulers == ("a:1", "b:2")

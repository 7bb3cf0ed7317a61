"""Throw-away authorities for tests."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from llmos.certs import Certificates, make_certificates
from llmos.config import TlsConfig


def make_authority(folder: Path) -> TlsConfig:
    """A new authority and a service's certificate for loopback."""
    return service_tls(make_certificates(folder, [], 1, datetime.now(UTC)))


def service_tls(files: Certificates) -> TlsConfig:
    """What a service is started with."""
    return TlsConfig(files.ca, files.certificate("server"), files.key("server"))


def tls_flags(tls: TlsConfig) -> tuple[str, ...]:
    """The same as command line flags."""
    pairs = {"--tls-ca-file": tls.ca_file, "--tls-cert-file": tls.cert_file, "--tls-key-file": tls.key_file}
    return tuple(str(part) for pair in pairs.items() for part in pair)

"""Throw-away authorities for tests."""

from __future__ import annotations

from pathlib import Path

from llmos.certs import make_certificates
from llmos.config import TlsConfig


def make_authority(folder: Path) -> TlsConfig:
    """A new authority with one certificate for 127.0.0.1 and localhost."""
    return make_certificates(folder)

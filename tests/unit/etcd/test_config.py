"""Configurations that cannot work are refused at once; passwords are not shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmos.errors import ConfigError
from llmos.etcd import EtcdConfig

_FILE = Path("x.pem")


@pytest.mark.parametrize(
    "fields",
    [
        {"endpoints": ()},
        {"endpoints": ("",)},
        {"endpoints": ("https://",)},
        {"endpoints": ("http://a:1", "https://b:1")},
        {"endpoints": ("http://a:1",), "ca_file": _FILE},
        {"cert_file": _FILE},
        {"key_file": _FILE},
        {"password": "secret"},
        {"call_timeout_s": 0},
        {"watch_idle_s": -1.0},
    ],
)
def test_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EtcdConfig(**fields)


def test_schemes_choose_tls_and_are_stripped() -> None:
    plain = EtcdConfig(endpoints=("a:1", "http://b:2/"))
    assert (plain.tls, plain.targets) == (False, ("a:1", "b:2"))
    assert EtcdConfig(endpoints=("https://a:1", "https://b:2")).tls
    assert EtcdConfig(endpoints=("a:1",), ca_file=_FILE).tls


def test_password_is_not_shown() -> None:
    assert "secret" not in repr(EtcdConfig(user="u", password="secret"))

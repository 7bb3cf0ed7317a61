"""Whether something answers: one HTTP GET of our own services, or a bare connection; with a deadline and no proxy."""

from __future__ import annotations

import errno
import http.client
import os
import socket
from urllib.parse import urlsplit

from llmos.errors import ConfigError

_LACKING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_NEEDED = 16
"""Descriptors that one look at a service takes at most."""


def can_look() -> bool:
    """Whether this process has what it needs to ask anybody: without descriptors, silence says nothing of others."""
    held: list[int] = []
    try:
        while len(held) < _NEEDED:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno not in _LACKING
    finally:
        for descriptor in held:
            os.close(descriptor)
    return True


def http_status(url: str, timeout_s: float) -> int | None:
    """The status that `url` answers; None if nothing answers in time."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path or "/")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def accepts(address: str, timeout_s: float) -> bool:
    """Whether anything at host:port takes a TCP connection in time. Raises ConfigError if it is no host:port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"'{address}' is no host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except (OSError, OverflowError):
        return False
    return True

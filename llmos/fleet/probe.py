"""One HTTP GET of our own services, with a deadline and no proxy."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit


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

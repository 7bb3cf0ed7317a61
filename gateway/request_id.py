"""Names of requests: the one that a client knows and the one inside the fleet, which no two tenants can share.

A generated id is unguessable and the same on both sides. A client's own id is prefixed with its tenant inside. Each
time a client takes up a broken stream, the inner id gets a new ending, because a cancelled id is never run again.
"""

from __future__ import annotations

import random
import re

_MAX_CHARS = 128
_ENDING = re.compile(r"~[0-9a-f]{8}\Z")


def is_acceptable(client_id: str) -> bool:
    """Whether a client may name its request so: 1 to 128 printable ASCII characters."""
    return 0 < len(client_id) <= _MAX_CHARS and client_id.isascii() and client_id.isprintable()


def generate(rng: random.Random) -> str:
    """An unguessable id, if `rng` is."""
    return f"req-{rng.getrandbits(128):032x}"


def inside(client_id: str, tenant: str) -> str:
    """The fleet's name for a request that its client named."""
    # Escaped, so that tenant "a/b" with id "c" isn't tenant "a" with id "b/c".
    return f"{tenant.replace('%', '%25').replace('/', '%2F')}/{client_id}"


def again(inner_id: str, rng: random.Random) -> str:
    """A new inner id for a resumed request."""
    return f"{_ENDING.sub('', inner_id)}~{rng.getrandbits(32):08x}"


def origin(inner_id: str) -> str:
    """The inner id that a request had before its client took it up for the first time."""
    return _ENDING.sub("", inner_id)


def names(request_id: str, inner_id: str, tenant: str) -> bool:
    """Whether `request_id`, as a client of `tenant` or an operator says it, means the request `inner_id`."""
    if request_id == inner_id:
        return True
    return _ENDING.sub("", inner_id) in {request_id, inside(request_id, tenant)}

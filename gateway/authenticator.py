"""Who asks: API keys as both edges check them."""

from __future__ import annotations

from gateway.types import Identity
from llmos.keys import KeyRing


class KeyAuthenticator:
    """Implements `gateway.types.Authenticator` with a key ring."""

    def __init__(self, ring: KeyRing) -> None:
        self._ring = ring

    def authenticate(self, authorization: str | None) -> Identity:
        """See `Authenticator`."""
        found = self._ring.authenticate(authorization)
        return Identity(found.tenant, found.role, found.priority, found.limits)

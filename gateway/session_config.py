"""Bounds of the session layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Bounds of the session layer."""

    leader_grace_s: float = 15.0
    """How long streams wait for a new leader before they end in a typed, resumable error."""
    max_requests: int = 4096
    """Most requests that run at once; more are refused with Retry-After."""
    buffer_bytes: int = 1024 * 1024
    """Most bytes of unread events per stream; past it the stream is aborted."""
    max_request_s: float = 3600.0
    """Longest life of a request, whatever deadline its client names."""
    gap_limit: int = 4
    """So often in a row may a stream's output be lost or damaged before the stream fails."""
    prefix_salt: str = ""
    """Secret of this deployment that prefix hashes depend on; the same for all its gateways."""

"""From etcd's gRPC statuses to what the client does about them. Pure.

etcd puts its reasons into the text of the status; the texts below are part of its API (api/v3rpc/rpctypes/error.go)
and have not changed since 3.2.
"""

from __future__ import annotations

import enum

import grpc

from llmos.errors import EtcdAuthFailed, EtcdError, EtcdUnavailable, LeaseLost


class Reaction(enum.Enum):
    """What to do after a failed attempt."""

    TRY_ELSEWHERE = "try elsewhere"
    """The endpoint, or the cluster for a moment, is at fault: another attempt can succeed."""

    REFRESH_TOKEN = "refresh token"  # noqa: S105
    """The auth token is missing, expired, or unknown to a server that restarted."""

    GIVE_UP = "give up"
    """The answer will not change: raise `to_error`."""


_TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,  # a connection that breaks in the middle of a frame
    grpc.StatusCode.CANCELLED,  # by the server, while it shuts down
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # too many requests; a full disk stays so until the deadline
}
_STALE_TOKEN = ("invalid auth token", "user name is empty", "revision in header is old")
_REFUSED = ("authentication failed", "permission denied", "invalid auth")
_LEASE_GONE = "requested lease not found"
_AUTH_DISABLED = "authentication is not enabled"


def reaction(code: grpc.StatusCode, details: str, *, has_user: bool) -> Reaction:
    """Decide what follows a failed attempt. `has_user`: whether there are credentials to get a token with."""
    if has_user and (code is grpc.StatusCode.UNAUTHENTICATED or any(text in details for text in _STALE_TOKEN)):
        return Reaction.REFRESH_TOKEN
    return Reaction.TRY_ELSEWHERE if code in _TRANSIENT else Reaction.GIVE_UP


def to_error(code: grpc.StatusCode, details: str) -> EtcdError:
    """The typed error for a status that is final."""
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return EtcdAuthFailed(f"etcd refused the credentials: {details}")
    if any(text in details for text in (*_STALE_TOKEN, *_REFUSED)):
        return EtcdAuthFailed(f"etcd refused the credentials: {details}")
    if _LEASE_GONE in details:
        return LeaseLost("The lease expired or was revoked")
    if code in _TRANSIENT:
        return EtcdUnavailable(f"etcd did not answer: {code.name.lower()}: {details}")
    return EtcdError(f"etcd refused the call: {code.name.lower()}: {details}")


def is_auth_disabled(details: str) -> bool:
    """Whether Authenticate failed because the cluster asks for no credentials at all."""
    return _AUTH_DISABLED in details

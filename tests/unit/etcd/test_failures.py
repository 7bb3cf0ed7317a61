"""What each of etcd's statuses means."""

from __future__ import annotations

import pytest
from grpc import StatusCode

from llmos.errors import EtcdAuthFailed, EtcdError, EtcdUnavailable, LeaseLost
from llmos.etcd.failures import Reaction, is_auth_disabled, reaction, to_error

_ELSEWHERE, _REFRESH, _GIVE_UP = Reaction.TRY_ELSEWHERE, Reaction.REFRESH_TOKEN, Reaction.GIVE_UP
_OLD = "auth: revision in header is old"
_WRONG = "etcdserver: authentication failed, invalid user ID or password"


@pytest.mark.parametrize(
    ("code", "details", "with_user", "without_user", "error"),
    [
        (StatusCode.UNAVAILABLE, "connection refused", _ELSEWHERE, _ELSEWHERE, EtcdUnavailable),
        (StatusCode.UNAVAILABLE, "etcdserver: no leader", _ELSEWHERE, _ELSEWHERE, EtcdUnavailable),
        (StatusCode.DEADLINE_EXCEEDED, "", _ELSEWHERE, _ELSEWHERE, EtcdUnavailable),
        (StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token", _REFRESH, _GIVE_UP, EtcdAuthFailed),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty", _REFRESH, _GIVE_UP, EtcdAuthFailed),
        (StatusCode.INVALID_ARGUMENT, _OLD, _REFRESH, _GIVE_UP, EtcdAuthFailed),
        (StatusCode.INVALID_ARGUMENT, _WRONG, _GIVE_UP, _GIVE_UP, EtcdAuthFailed),
        (StatusCode.PERMISSION_DENIED, "etcdserver: permission denied", _GIVE_UP, _GIVE_UP, EtcdAuthFailed),
        (StatusCode.UNKNOWN, "etcdserver: permission denied", _GIVE_UP, _GIVE_UP, EtcdAuthFailed),
        (StatusCode.NOT_FOUND, "etcdserver: requested lease not found", _GIVE_UP, _GIVE_UP, LeaseLost),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: key is not provided", _GIVE_UP, _GIVE_UP, EtcdError),
    ],
)
def test_reaction_and_error(
    code: StatusCode, details: str, with_user: Reaction, without_user: Reaction, error: type[EtcdError]
) -> None:
    assert reaction(code, details, has_user=True) is with_user
    assert reaction(code, details, has_user=False) is without_user
    assert type(to_error(code, details)) is error


def test_cluster_without_passwords() -> None:
    assert is_auth_disabled("etcdserver: authentication is not enabled")
    assert not is_auth_disabled("etcdserver: authentication failed, invalid user ID or password")

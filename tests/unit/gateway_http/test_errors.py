"""Errors as clients see them."""

from __future__ import annotations

import pytest

from gateway.http.errors import error_headers, error_object, visible
from llmos.errors import (
    AttemptLost,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LlmosError,
    ModelNotFound,
    NotLeader,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (Overloaded("full"), Overloaded),
        (InvalidRequest("bad"), InvalidRequest),
        (AttemptLost("worker 10.0.0.7 died"), Unavailable),
        (NotLeader("no", leader_address="10.0.0.7:1"), Unavailable),
        (ConfigError("/etc/keys is missing"), InternalError),
        (LlmosError("what"), InternalError),
        (KeyError("secret"), InternalError),
    ],
)
def test_only_what_concerns_clients_is_shown(error: Exception, shown: type[LlmosError]) -> None:
    seen = visible(error)
    assert type(seen) is shown
    said = str(error_object(seen, "req-1"))
    assert not any(word in said for word in ("10.0.0.7", "/etc", "secret"))
    assert "req-1" in said


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("x", param="n"), "invalid_request_error"),
        (Unauthenticated("x"), "authentication_error"),
        (PermissionDenied("x"), "permission_error"),
        (ModelNotFound("x"), "not_found_error"),
        (Overloaded("x"), "rate_limit_error"),
        (Unavailable("x"), "server_error"),
        (DeadlineExceeded("x"), "server_error"),
        (InternalError("x"), "server_error"),
    ],
)
def test_the_object_has_openais_members(error: LlmosError, kind: str) -> None:
    inner = error_object(error, "r")["error"]
    assert isinstance(inner, dict)
    assert inner["type"] == kind
    assert inner["code"] == error.code
    assert inner["param"] == error.param


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Overloaded("x", retry_after_s=2.1), {"x-should-retry": "true", "retry-after": "3", "retry-after-ms": "2100"}),
        (Unavailable("x"), {"x-should-retry": "true", "retry-after": "1", "retry-after-ms": "1000"}),
        (InvalidRequest("x"), {"x-should-retry": "false"}),
        (InternalError("x"), {"x-should-retry": "false"}),
        (DeadlineExceeded("x"), {"x-should-retry": "false"}),
    ],
)
def test_headers_say_whether_to_come_back(error: LlmosError, expected: dict[str, str]) -> None:
    assert {name.decode(): value.decode() for name, value in error_headers(error)} == expected

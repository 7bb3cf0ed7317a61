"""Errors as OpenAI's clients know them: an object, a status and headers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from llmos.errors import CapacityError, ClientError, FleetError, InternalError, LlmosError, Unavailable

Headers = list[tuple[bytes, bytes]]

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_RETRY_STATUSES = frozenset({429, 503})
_DEFAULT_RETRY_S = 1.0


def visible(error: BaseException) -> LlmosError:
    """What a client may see of `error`. Errors between services become Unavailable, bugs InternalError."""
    if isinstance(error, ClientError | CapacityError | InternalError):
        return error
    if isinstance(error, FleetError):
        return Unavailable("The fleet cannot answer right now; try again.", retry_after_s=error.retry_after_s)
    return InternalError("internal error")


def error_object(error: LlmosError, request_id: str) -> Mapping[str, object]:
    """OpenAI's error object, `{"error": {message, type, param, code}}`, with the request id beside it."""
    message = error.message
    if isinstance(error, InternalError):
        message = f"Something went wrong on our side. Quote request id {request_id} when you report it."
    kind = _TYPES.get(error.http_status, "server_error" if error.http_status >= 500 else "invalid_request_error")
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": error.param,
            "code": error.code,
            "request_id": request_id,
        }
    }


def error_headers(error: LlmosError) -> Headers:
    """When to come back, and whether to: the headers that OpenAI's clients obey."""
    if error.http_status not in _RETRY_STATUSES:
        return [(b"x-should-retry", b"false")]
    wait_s = error.retry_after_s if error.retry_after_s and error.retry_after_s > 0 else _DEFAULT_RETRY_S
    return [
        (b"x-should-retry", b"true"),
        (b"retry-after", b"%d" % math.ceil(wait_s)),
        (b"retry-after-ms", b"%d" % math.ceil(wait_s * 1000)),
    ]


def error_json(error: LlmosError, request_id: str) -> bytes:
    """The error object, encoded."""
    return msgspec.json.encode(error_object(error, request_id))

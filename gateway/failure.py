"""Failures inside the fleet as a client may see them."""

from __future__ import annotations

from llmos.errors import FleetError, InternalError, LlmosError, SetupError, Unavailable, from_code
from llmos.internal.v1 import request_pb2


def for_client(failure: request_pb2.Failure, constraint_field: str = "") -> LlmosError:
    """The error that ends the client's stream: typed, and without what only services may know.

    `constraint_field` is what the client calls the fleet's `constraint`.
    """
    wait = failure.retry_after_ms / 1000 if failure.retry_after_ms else None
    param = constraint_field or failure.param if failure.param == "constraint" else failure.param
    error = from_code(failure.code, failure.message, param=param or None, retry_after_s=wait)
    if isinstance(error, FleetError | SetupError):
        return Unavailable("The fleet lost the request; send it again.", retry_after_s=wait or 1.0)
    if isinstance(error, InternalError):
        return InternalError("Something broke inside; the request id helps to find it.")
    return error

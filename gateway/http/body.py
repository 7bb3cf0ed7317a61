"""Reading a body: every limit holds before what it limits is kept."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import cast

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive

from gateway.config import HttpLimits
from gateway.http.attend import ClientGone
from llmos.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

# Possessive quantifiers, so that an unterminated string costs one pass and no memory.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


async def read_json(receive: Receive, headers: Headers, limits: HttpLimits) -> Mapping[str, object]:
    """The JSON object that a request carries. Raises ClientError, or ClientGone."""
    _check_headers(headers, limits)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            raw = await _read(receive, limits.max_body_bytes)
    except TimeoutError:
        raise InvalidRequest(f"The body did not arrive within {limits.body_timeout_s:g} s.") from None
    return parse(raw, limits.max_json_depth)


def parse(raw: bytes, max_depth: int) -> Mapping[str, object]:
    """Decode a JSON object of bounded depth. Raises InvalidRequest."""
    _check_depth(raw, max_depth)
    try:
        value = msgspec.json.decode(raw)
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not valid UTF-8.") from None
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The body has a number that is out of range: {error}.") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return cast(Mapping[str, object], value)


def _check_headers(headers: Headers, limits: HttpLimits) -> None:
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("Send JSON, with the header 'Content-Type: application/json'.", param="content-type")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("Send the body uncompressed.", param="content-encoding")
    declared = headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limits.max_body_bytes):
        raise _too_large(limits.max_body_bytes)


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is larger than {limit} bytes.")


def _check_depth(raw: bytes, limit: int) -> None:
    """Refuse deep nesting before the parser recurses: each round takes the innermost brackets away."""
    if raw.count(b"[") + raw.count(b"{") <= limit:
        return
    brackets = _STRINGS.sub(b"", raw).translate(None, _NOT_BRACKETS)
    for _ in range(limit):
        if not brackets:
            return
        fewer = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(fewer) == len(brackets):
            break
        brackets = fewer
    if not brackets:
        return
    if b"[]" not in brackets and b"{}" not in brackets:
        raise InvalidRequest("The body is not valid JSON, or nested too deeply.")
    raise InvalidRequest(f"The body is nested more than {limit} levels deep.")

"""A checksum over every message between services whose corruption could reach a client.

TCP's own is 16 bits wide and ends at every proxy, HTTP/2 and protobuf have none: a flipped bit in a token id is a valid
message. So a message's last field, `checksum` (number 15 everywhere), holds the CRC-32 (that of zlib) of all bytes
before it. It is computed over the serialized message as a whole, whatever that says, prompts and resumes on their way
down included, and costs a microsecond. Messages without that field pass as they are.

A peer that knows of no checksums is heard as before; once a stream's first message had one, all of them must.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

import grpc
from google.protobuf.message import DecodeError

from llmos.errors import DamagedMessage

_TAG = 15 << 3 | 5
"""Field 15, four bytes (fixed32)."""
_SIZE = 5

Serialize = Callable[[Any], bytes]
Parse = Callable[[bytes], Any]
_has: dict[type, bool] = {}


def _sealable(kind: type[Any]) -> bool:
    known = _has.get(kind)
    if known is None:
        fields = kind.DESCRIPTOR.fields_by_name if hasattr(kind, "DESCRIPTOR") else ()
        known = _has[kind] = "checksum" in fields
    return known


def sealing(serialize: Serialize) -> Serialize:
    """The same serializer, with the checksum behind it."""

    def seal(message: Any) -> bytes:
        data = serialize(message)
        if not _sealable(type(message)):
            return data
        return b"%b%c%b" % (data, _TAG, crc32(data).to_bytes(4, "little"))

    return seal


class Opener:
    """A parser that checks. One for each stream: it remembers whether the peer seals."""

    def __init__(self, parse: Parse) -> None:
        self._parse = parse
        self._expects: bool | None = None

    def __call__(self, data: bytes) -> Any:
        """Raises DamagedMessage."""
        try:
            message = self._parse(data)
        except DecodeError as error:
            if self._expects:
                raise DamagedMessage("The message cannot be read.") from error
            raise
        if not _sealable(type(message)):
            return message
        sealed = message.HasField("checksum")
        if sealed and (data[-_SIZE] != _TAG or crc32(memoryview(data)[:-_SIZE]) != message.checksum):
            raise DamagedMessage("The message does not match its checksum.")
        if self._expects and not sealed:
            raise DamagedMessage("The message has lost its checksum.")
        if self._expects is None:
            self._expects = sealed
        return message


def sealed(channel: grpc.aio.Channel) -> Any:
    """A channel for a stub of one stream: what it sends is sealed, what it receives is checked.

    grpc.aio logs what a parser raises, and hands None to whoever reads.
    """
    return _SealedChannel(channel)


class _SealedChannel:
    """As much of a channel as stubs use."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def unary_unary(self, method: str, request_serializer: Serialize, response_deserializer: Parse, **more: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._channel.unary_unary(method, sealing(request_serializer), Opener(response_deserializer), **more)

    def unary_stream(
        self, method: str, request_serializer: Serialize, response_deserializer: Parse, **more: Any
    ) -> Any:
        """See `grpc.aio.Channel`."""
        return self._channel.unary_stream(method, sealing(request_serializer), Opener(response_deserializer), **more)

    def stream_stream(
        self, method: str, request_serializer: Serialize, response_deserializer: Parse, **more: Any
    ) -> Any:
        """See `grpc.aio.Channel`."""
        return self._channel.stream_stream(method, sealing(request_serializer), Opener(response_deserializer), **more)

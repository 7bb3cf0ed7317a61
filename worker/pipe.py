"""Messages over a local stream socket: four bytes of length, little-endian, then the protobuf or JSON message."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import BinaryIO

_LENGTH = struct.Struct("<I")
LIMIT_BYTES = 256 * 1024 * 1024
"""A longer message is a broken pipe, not a message."""


def frame(message: bytes) -> bytes:
    """The message with its length in front."""
    return _LENGTH.pack(len(message)) + message


def read(stream: BinaryIO) -> bytes | None:
    """The next message, blocking; None when the other end is gone."""
    try:
        head = stream.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        length = _LENGTH.unpack(head)[0]
        body = stream.read(length) if length <= LIMIT_BYTES else b""
    except OSError:
        return None
    return body if len(body) == length else None


def write(sock: socket.socket, message: bytes) -> None:
    """Send a message, blocking. Raises OSError when the other end is gone."""
    sock.sendall(frame(message))


async def receive(reader: asyncio.StreamReader) -> bytes | None:
    """The next message; None when the other end is gone."""
    try:
        length = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))[0]
        return await reader.readexactly(length) if length <= LIMIT_BYTES else None
    except (asyncio.IncompleteReadError, OSError):
        return None

"""What a gateway leaves with the fleet so that any other one can go on with a stream: sealed, for gateways' eyes only.

Authenticated encryption (AES-256-GCM, RFC 5116) under a key that the gateways of a fleet share. A blob is bound to its
tenant and request: it cannot be moved to another one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gateway.types import Started, View
from llmos.errors import ConfigError

_KEY_BYTES = 32
_NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a stream's tokens become its client's events. The prompt is not in it: its tokens are in the request."""

    started: Started
    kind: str
    """`chat` or `completion`."""
    tokenizer_hash: str
    vocab_size: int
    stop: tuple[str, ...]
    constraint_field: str
    view: View | None
    """How it is shown over HTTP; None: it was not asked for there."""


class Unreadable(Exception):
    """Not sealed by a gateway with one of these keys, or for another request."""


class Vault:
    """Seals with the first key, opens with any, so that keys can be changed one gateway at a time."""

    def __init__(self, keys: Sequence[bytes] = (), rng: random.Random | None = None) -> None:
        """Without keys one is made up, and only this gateway can open what it seals. `rng` must be unguessable."""
        self._rng = rng or random.SystemRandom()
        self._ciphers = [AESGCM(key) for key in keys or (self._rng.randbytes(_KEY_BYTES),)]
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Recipe).decode

    def seal(self, recipe: Recipe, tenant: str, request_id: str) -> bytes:
        """The blob: nonce, ciphertext, tag."""
        nonce = self._rng.randbytes(_NONCE_BYTES)
        return nonce + self._ciphers[0].encrypt(nonce, self._encode(recipe), _bound_to(tenant, request_id))

    def open(self, blob: bytes, tenant: str, request_id: str) -> Recipe:
        """What was sealed. Raises Unreadable."""
        for cipher in self._ciphers:
            try:
                content = cipher.decrypt(blob[:_NONCE_BYTES], blob[_NONCE_BYTES:], _bound_to(tenant, request_id))
                return self._decode(content)
            except (InvalidTag, ValueError, msgspec.MsgspecError):
                continue
        raise Unreadable


def _bound_to(tenant: str, request_id: str) -> bytes:
    return f"{len(tenant)}:{tenant}{request_id}".encode()


def read_keys(file: Path) -> list[bytes]:
    """Keys of a file: each line has one, as 64 hexadecimal digits. Raises ConfigError."""
    try:
        lines = file.read_text(encoding="ascii").split()
        keys = [bytes.fromhex(line) for line in lines]
    except OSError as error:
        raise ConfigError(
            f"cannot read the stream keys {file}: {error.strerror or error}", param="stream_key_file"
        ) from error
    except ValueError:
        keys = []
    if not keys or any(len(key) != _KEY_BYTES for key in keys):
        raise ConfigError(
            f"{file} must have keys of 64 hexadecimal digits, one a line (`openssl rand -hex 32` makes one).",
            param="stream_key_file",
        )
    return keys

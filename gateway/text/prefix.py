"""Salted hashes of prompt prefixes: how schedulers and workers recognise a cached prefix without seeing its text."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_TOKENS = 64
_BLOCK = struct.Struct(f"<{BLOCK_TOKENS}I")
_HASH_BYTES = 8


def prefix_hashes(
    token_ids: Sequence[int], *, model_version: str, tenant: str, adapter: str = "", salt: bytes = b""
) -> list[int]:
    """One hash of 64 bits per full block of 64 tokens; each covers all tokens up to the end of its block.

    Hashes of other versions, adapters, tenants or deployments (`salt`) have nothing in common, so that no tenant can
    find out by timing what another one has asked.
    """
    key = blake2b(salt, digest_size=32).digest()
    link = blake2b(_framed(model_version, adapter, tenant), digest_size=_HASH_BYTES, key=key).digest()
    hashes = []
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = _BLOCK.pack(*token_ids[start : start + BLOCK_TOKENS])
        link = blake2b(link + block, digest_size=_HASH_BYTES, key=key).digest()
        hashes.append(int.from_bytes(link, "little"))
    return hashes


def _framed(*parts: str) -> bytes:
    # Lengths keep ("a", "bc") and ("ab", "c") apart.
    encoded = [part.encode() for part in parts]
    return b"".join(len(part).to_bytes(4, "little") + part for part in encoded)

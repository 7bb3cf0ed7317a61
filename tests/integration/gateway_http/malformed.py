"""Bodies that no server may accept, and none may choke on: the same list on every run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from tests.integration.gateway_http.conftest import HELLO

SEED = 20_240_607
WRONG: list[object] = [
    "text",
    "",
    -1,
    10**30,
    -(10**30),
    1.5,
    True,
    [],
    [None],
    {},
    {"a": {"b": {}}},
    [[[[]]]],
    ["x" * 300],
]
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("max_tokens", "top_k", "n", "seed", "min_tokens", "top_logprobs")
OTHERS = ("model", "messages", "stream", "stream_options", "stop", "stop_token_ids", "logit_bias", "response_format")
RAW: list[bytes] = [
    b"",
    b" ",
    b"{",
    b"}",
    b"null",
    b"[]",
    b"1",
    b'"text"',
    b"\x00",
    b"\xff\xfe\x00",
    b"{}",
    b'{"model": "tiny"}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}]} trailing',
    b"[" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"model": "tiny", "messages": ' + b"[" * 65 + b"]" * 65 + b"}",
    b'{"messages": [{"role": "user", "content": "x"}]}',
    json.dumps({"model": "tiny", "messages": HELLO}).encode("utf-16"),
    json.dumps({"model": "tiny", "messages": HELLO * 2000}).encode(),
    json.dumps({"model": "tiny", "messages": HELLO, "x" * 70_000: 1}).encode(),
    json.dumps({"model": "tiny", "messages": HELLO, "logit_bias": {str(n): 1 for n in range(2000)}}).encode(),
]


def bodies() -> Iterator[bytes]:
    """Every body, deterministic."""
    yield from RAW
    yield from _wrong_fields()
    yield from _damaged()


def _wrong_fields() -> Iterator[bytes]:
    good = {"model": "tiny", "messages": HELLO}
    allowed = {
        "model": {"text"},
        "stop": {"text", "[]"},
        "stop_token_ids": {"[]"},
        "logit_bias": {"{}"},
        "stream_options": {"{}", "{'a': {'b': {}}}"},
        "stream": {"True"},
    }
    for name in (*NUMBERS, *INTEGERS, *OTHERS):
        for value in WRONG:
            if str(value) in allowed.get(name, set()):
                continue
            if name in NUMBERS and value in (1.5, -1) and not isinstance(value, bool):
                continue
            if name in ("top_k", "seed") and value == -1:
                continue
            extra = {"logprobs": True} if name == "top_logprobs" else {}
            yield json.dumps({**good, **extra, name: value}).encode()
    for message in ({}, {"role": "user"}, {"role": "x", "content": "y"}, {"role": "user", "content": 5}, 5, None, []):
        yield json.dumps({**good, "messages": [*HELLO, message]}).encode()
    for content in ([5], [{}], [{"type": "text"}], [{"type": "image_url"}], [{"type": 5, "text": "x"}], {"a": 1}):
        yield json.dumps({**good, "messages": [{"role": "user", "content": content}]}).encode()


def _damaged() -> Iterator[bytes]:
    """Good bodies with a byte cut off, or with a bracket or quote struck out: never JSON again."""
    rng = random.Random(SEED)
    good = json.dumps({"model": "tiny", "messages": HELLO, "stop": ["a", "b"], "n": 2}).encode()
    for _ in range(20):
        yield good[: rng.randrange(1, len(good))]
    structural = [position for position, byte in enumerate(good) if byte in b'{}[]":']
    for position in rng.sample(structural, 20):
        yield good[:position] + good[position + 1 :]

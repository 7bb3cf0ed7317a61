"""Random JSON schemas with bounded answers, of rising depth, from a seed. Pure."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

_NAMES = (
    "name",
    "kind",
    "size",
    "count",
    "tags",
    "parent",
    "note",
    "state",
    "code",
    "when",
    "active",
    "first name",
    "größe",
)
_WORDS = ("red", "green", "dark blue", "n/a", 'say "hi"', "naïve", "x", "one\ntwo", "日本", "")
_PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^[a-z]{1,8}(_[a-z]{1,4}){0,2}$", "^(cat|dog|bird) [0-9]{1,2}$", "^#[0-9a-f]{6}$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4")
_MOST_BYTES = 4000
"""Longest answer of a schema: it must fit into a context."""
_CHAR_BYTES = 6
"""Most bytes of one character of a string: an escape."""


def schemas(count: int, seed: int, deepest: int = 5) -> list[Schema]:
    """`count` schemas; the nesting of objects and arrays rises evenly from 0 to `deepest`."""
    source = random.Random(seed)
    return [_small_value(source, number * (deepest + 1) // count) for number in range(count)]


def most_bytes(schema: Schema) -> int:
    """Upper bound of the length of an answer, in UTF-8 bytes: no tokenizer needs more tokens."""
    return int(schema["x-bytes"])


def _small_value(source: random.Random, depth: int) -> Schema:
    while most_bytes(schema := _value(source, depth)) > _MOST_BYTES:
        continue
    return schema


def without_bounds(schema: Any) -> Any:
    """The schema as it is sent: without what `most_bytes` reads."""
    if isinstance(schema, dict):
        return {key: without_bounds(value) for key, value in schema.items() if key != "x-bytes"}
    return [without_bounds(value) for value in schema] if isinstance(schema, list) else schema


def _value(source: random.Random, depth: int) -> Schema:
    """A value that is nested exactly `depth` deep."""
    if depth == 0:
        return _leaf(source)
    return _array(source, depth) if source.random() < 0.3 else _object(source, depth)


def _object(source: random.Random, depth: int) -> Schema:
    names = source.sample(_NAMES, source.randint(1, 4))
    children = [_value(source, depth - 1)]
    children += [_value(source, source.randrange(min(depth, 2))) for _ in names[1:]]
    source.shuffle(children)
    required = [name for name in names if source.random() < 0.7]
    total = sum(most_bytes(child) + _CHAR_BYTES * len(name) + 6 for name, child in zip(names, children, strict=True))
    return {
        "type": "object",
        "properties": dict(zip(names, children, strict=True)),
        "required": required,
        "additionalProperties": False,
        "x-bytes": 2 + total,
    }


def _array(source: random.Random, depth: int) -> Schema:
    item = _value(source, depth - 1)
    most = source.randint(1, 3)
    return {
        "type": "array",
        "items": item,
        "minItems": source.randint(0, most),
        "maxItems": most,
        "x-bytes": 2 + most * (most_bytes(item) + 2),
    }


def _leaf(source: random.Random) -> Schema:
    match source.randrange(8):
        case 0:
            return {"type": "string", "maxLength": (most := source.randint(1, 16)), "x-bytes": 2 + most * _CHAR_BYTES}
        case 1:
            words = source.sample(_WORDS, source.randint(1, 4))
            return {"enum": words, "x-bytes": 2 + max(len(word) for word in words) * _CHAR_BYTES}
        case 2:
            least = source.randint(-1000, 1000)
            return {"type": "integer", "minimum": least, "maximum": least + source.randint(0, 5000), "x-bytes": 5}
        case 3:
            return {"type": "boolean", "x-bytes": 5}
        case 4:
            return {"type": "string", "pattern": source.choice(_PATTERNS), "x-bytes": 24}
        case 5:
            return {"type": "string", "format": source.choice(_FORMATS), "x-bytes": 64}
        case 6:
            options = [
                {"type": "null"},
                {"type": "string", "maxLength": 8},
                {"type": "integer", "minimum": 0, "maximum": 9},
            ]
            return {"anyOf": options[: source.randint(2, 3)], "x-bytes": 2 + 8 * _CHAR_BYTES}
        case _:
            return {"const": source.choice((7, "fixed", True, None, [1, "two"])), "x-bytes": 10}

"""What an output must look like: the fields that say so, and their bounds. Pure.

OpenAI's `response_format`; vLLM's `structured_outputs` and its older `guided_json`, `guided_regex`, `guided_choice`. At
most one of them may be set. Whether a schema or a regular expression can be followed is the worker's verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from gateway.schemas import GenerationBody
from gateway.types import Constraint
from llmos.errors import InvalidRequest, UnsupportedFeature

MAX_BYTES = 64 * 1024
"""UTF-8 bytes of a schema, of a regular expression, of all choices together."""
MAX_DEPTH = 64
MAX_CHOICES = 1024


def constraint_of(body: GenerationBody) -> Constraint | None:
    """The one constraint that a body has. Raises InvalidRequest or UnsupportedFeature."""
    found = [*_response_format(body), *_structured_outputs(body), *_guided(body)]
    if len(found) > 1:
        raise InvalidRequest(f"Give '{found[0].field}' or '{found[1].field}', not both.", param=found[1].field)
    return found[0] if found else None


def _response_format(body: GenerationBody) -> Iterator[Constraint]:
    field, asked = "response_format", body.response_format
    if asked is None or asked.type == "text":
        return
    if asked.type == "json_object":
        yield Constraint("json_object", field)
    elif asked.type != "json_schema":
        raise UnsupportedFeature(f"'{field}.type' must be text, json_object or json_schema.", param=f"{field}.type")
    elif asked.json_schema is None:
        raise InvalidRequest(f"'{field}.json_schema' is required.", param=f"{field}.json_schema")
    elif asked.json_schema.schema is None:
        raise InvalidRequest(f"'{field}.json_schema.schema' is required.", param=f"{field}.json_schema.schema")
    else:
        yield _schema(asked.json_schema.schema, f"{field}.json_schema.schema")


def _structured_outputs(body: GenerationBody) -> Iterator[Constraint]:
    field, asked = "structured_outputs", body.structured_outputs
    if asked is None:
        return
    found = list(_kinds(asked.json, asked.regex, asked.choice, f"{field}."))
    if asked.json_object:
        found.append(Constraint("json_object", f"{field}.json_object"))
    if not found:
        raise InvalidRequest(f"'{field}' needs one of json, json_object, regex and choice.", param=field)
    yield from found


def _guided(body: GenerationBody) -> Iterator[Constraint]:
    return _kinds(body.guided_json, body.guided_regex, body.guided_choice, "guided_")


def _kinds(
    schema: str | Mapping[str, Any] | None, regex: str | None, choice: Sequence[str] | None, prefix: str
) -> Iterator[Constraint]:
    if schema is not None:
        yield _schema(schema, f"{prefix}json")
    if regex is not None:
        yield _regex(regex, f"{prefix}regex")
    if choice is not None:
        yield _choice(choice, f"{prefix}choice")


def _schema(schema: str | Mapping[str, Any], field: str) -> Constraint:
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    _bound([text], field)
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(f"'{field}' is not valid JSON.", param=field) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"'{field}' must be a JSON object.", param=field)
    if _depth(value) > MAX_DEPTH:
        raise InvalidRequest(f"'{field}' is nested more than {MAX_DEPTH} levels deep.", param=field)
    return Constraint("json_schema", field, text)


def _depth(value: object) -> int:
    level, depth = [value], 0
    while level := [child for node in level if isinstance(node, dict | list) for child in _children(node)]:
        depth += 1
    return depth + isinstance(value, dict | list)


def _children(node: dict[str, object] | list[object]) -> Iterator[object]:
    return iter(node.values() if isinstance(node, dict) else node)


def _regex(text: str, field: str) -> Constraint:
    if not text:
        raise InvalidRequest(f"'{field}' must not be empty.", param=field)
    _bound([text], field)
    return Constraint("regex", field, text)


def _choice(texts: Sequence[str], field: str) -> Constraint:
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidRequest(f"'{field}' must have 1 to {MAX_CHOICES} texts.", param=field)
    if not all(texts):
        raise InvalidRequest(f"The texts of '{field}' must not be empty.", param=field)
    _bound(texts, field)
    return Constraint("choice", field, texts=tuple(texts))


def _bound(texts: Sequence[str], field: str) -> None:
    if sum(len(text.encode()) for text in texts) > MAX_BYTES:
        raise InvalidRequest(f"'{field}' is larger than {MAX_BYTES} bytes.", param=field)

"""Dates and times of JSON schemas as patterns. Pure.

llguidance's own patterns let through what validators refuse: 29 February of every year, the year 0, leap seconds, and
fractions of any length. A schema's `format` gives way to a pattern that is exact (RFC 3339).
"""

from __future__ import annotations

from typing import Any

import msgspec

from llmos.errors import InvalidConstraint

_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DAY = "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
"""Of any year."""
_DATE = f"({_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR = "([01][0-9]|2[0-3])"
_TIME = rf"{_HOUR}:[0-5][0-9]:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{_HOUR}:[0-5][0-9])"
PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}

_SCHEMA = ("items", "additionalItems", "additionalProperties", "unevaluatedProperties", "contains", "propertyNames")
_SCHEMAS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def with_patterns(schema: str) -> str:
    """The schema with patterns for formats, wherever a string has no other pattern. Raises InvalidConstraint."""
    if '"format"' not in schema:
        return schema
    try:
        value = msgspec.json.decode(schema)
        _replace(value)
        return msgspec.json.encode(value).decode()
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidConstraint(
            "The schema cannot be read: it is not valid JSON, or nested too deeply.", param="constraint"
        ) from error


def _replace(schema: Any) -> None:
    if not isinstance(schema, dict):
        return
    pattern = PATTERNS.get(found) if isinstance(found := schema.get("format"), str) else None
    if pattern is not None and "pattern" not in schema:
        del schema["format"]
        schema["pattern"] = pattern
    for key, value in schema.items():
        if key in _SCHEMA:
            _replace(value)
        for child in value if key in _SCHEMAS and isinstance(value, list) else ():
            _replace(child)
        for child in value.values() if key in _NAMED_SCHEMAS and isinstance(value, dict) else ():
            _replace(child)

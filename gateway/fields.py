"""Checks that all bodies have in common: known fields, types with a path in each refusal, bounds on text. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

import msgspec

from gateway.schemas import MAX_TEXT_CHARS
from llmos.errors import InvalidRequest, PayloadTooLarge

_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`(?: - at `\$(?P<path>[^`]*)`)?")
_VIOLATION = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?", re.DOTALL)
_JSON_WORDS = {"float": "number", "int": "integer", "str": "string", "bool": "boolean"}

BodyT = TypeVar("BodyT", bound=msgspec.Struct)


def unknown(key: object, known: Collection[str], path: str) -> InvalidRequest:
    """The refusal of a field that nobody knows, with the right spelling if there is one."""
    shown = str(key)[:64]
    close = difflib.get_close_matches(shown, sorted(known), n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return InvalidRequest(f"Unknown field '{shown}'.{hint}", param=path[:128])


def convert(body: Mapping[str, object], kind: type[BodyT]) -> BodyT:
    """The fields of `body` that `kind` has, checked one by one. Raises InvalidRequest."""
    known = kind.__struct_fields__
    try:
        return msgspec.convert({key: value for key, value in body.items() if key in known}, kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None


def _refusal(text: str) -> InvalidRequest:
    """msgspec's complaint as a sentence with a path."""
    missing = _MISSING.fullmatch(text)
    if missing:
        path = f"{missing['path'] or ''}.{missing['field']}".removeprefix(".")
        return InvalidRequest(f"'{path}' is required.", param=path)
    found = _VIOLATION.fullmatch(text)
    path = (found["path"] or "").removeprefix(".") if found else ""
    what = found["what"] if found else text
    for python, word in _JSON_WORDS.items():
        what = re.sub(rf"\b{python}\b", word, what)
    what = what[:1].lower() + what[1:].replace("`", "")
    return InvalidRequest(f"'{path}' is not valid: {what.replace('`', '')}.", param=path or None)


def bound_text(texts: Iterable[str], param: str) -> None:
    """Raises PayloadTooLarge where the texts are too long together."""
    total = sum(len(text) for text in texts)
    if total > MAX_TEXT_CHARS:
        raise PayloadTooLarge(f"'{param}' has {total} characters; at most {MAX_TEXT_CHARS} are possible.", param=param)

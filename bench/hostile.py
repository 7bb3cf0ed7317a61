"""Constraints that are hard on purpose: to parse, to compile, to follow, or impossible. Pure."""

from __future__ import annotations

import json
from typing import Any

from worker.backend import Constraint


def constraints() -> dict[str, Constraint]:
    """By name."""
    made = {name: Constraint("json_schema", json.dumps(schema)) for name, schema in _schemas().items()}
    made |= {name: Constraint("regex", text) for name, text in _REGEXES.items()}
    made["brackets"] = Constraint("json_schema", '{"items":' * 5000 + "1" + "}" * 5000)
    made["choices"] = Constraint("choice", texts=tuple(f"{number * 7919:060d}" for number in range(1024)))
    return made


_REGEXES = {
    "two ways to say x": "(x+x+)+y",
    "a, 400 characters ago": "[ab]*a[ab]{400}",
    "three of them": "(.*a.{60}|.*b.{61}|.*c.{62}|.*d.{63})+",
    "optional, 500 times": "(a?){500}a{500}b",
    "nested counts": "(((((a{0,50}b){0,50}c){0,50}d){0,50}e){0,50}f){0,50}",
    "a million": "(((a{1,1000}){1,1000}){1,1000}){1,1000}",
    "alphabets": r"(\p{L}{0,500}\d{0,500}){0,500}",
    "words": r"(\w{1,40} ){1,400}\.",
    "pairs": "(" + "|".join(f"{number}.*{number}" for number in range(5000)) + ")",
    "parentheses": "(" * 20_000 + ")" * 20_000,
    "dots": "(.{0,1000}x){0,1000}y",
}


def _schemas() -> dict[str, Any]:
    return {
        "wide and deep": _tree(12),
        "wider and deeper": _tree(16),
        "branches of branches": _branches(10),
        "a thousand optional properties": {"properties": {f"p{n}": {"type": "string"} for n in range(1000)}},
        "intersections": {"allOf": [{"type": "string", "pattern": f".*{n}.*"} for n in range(100)]},
        "multiples": {"type": "integer", "multipleOf": 9_999_991},
        "arrays of arrays": _arrays(5),
        "a reference to itself": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}},
        "a long string": {"type": "string", "minLength": 10**6},
        "impossible": {"type": "integer", "minimum": 2, "maximum": 1},
    }


def _tree(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["a"]}
    return schema


def _branches(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"allOf": [{"anyOf": [schema, {"type": "integer"}]}, {"anyOf": [{"type": "string"}, schema]}]}
    return schema


def _arrays(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "maxItems": 1000}
    return schema

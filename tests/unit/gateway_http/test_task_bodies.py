"""The validator's verdicts on bodies for vectors, labels and scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from gateway import task_bodies
from gateway.schemas import MAX_TEXT_CHARS
from gateway.task_bodies import MAX_INPUTS, Input
from llmos.errors import InvalidRequest, PayloadTooLarge

Json = dict[str, Any]
EMBED: Json = {"model": "m", "input": "a"}
SCORE: Json = {"model": "m", "text_1": "q", "text_2": ["a", "b"]}
RERANK: Json = {"model": "m", "query": "q", "documents": ["a", {"text": "b"}]}


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", [Input("a", "input")]),
        (["a", "b"], [Input("a", "input[0]"), Input("b", "input[1]")]),
        ([1, 2], [Input((1, 2), "input")]),
        ([[1], [2, 3]], [Input((1,), "input[0]"), Input((2, 3), "input[1]")]),
    ],
)
def test_every_form_of_input(given: object, inputs: list[Input]) -> None:
    assert task_bodies.embedding(EMBED | {"input": given}).inputs == inputs
    assert task_bodies.classification(EMBED | {"input": given}).inputs == inputs


def test_every_field_arrives() -> None:
    ask = task_bodies.embedding(
        EMBED | {"encoding_format": "base64", "dimensions": 8, "truncate_prompt_tokens": -1, "user": "u"}
    )
    assert (ask.model, ask.base64, ask.dimensions, ask.truncate) == ("m", True, 8, -1)
    plain = task_bodies.embedding(EMBED | {"encoding_format": None, "dimensions": None})
    assert (plain.base64, plain.dimensions, plain.truncate) == (False, None, None)


def test_pairs_one_to_many_and_one_to_one() -> None:
    ask = task_bodies.score(SCORE)
    assert (ask.first, ask.second) == ([Input("q", "text_1")], [Input("a", "text_2[0]"), Input("b", "text_2[1]")])
    pairs = task_bodies.score(SCORE | {"text_1": ["x", "y"]})
    assert [one.content for one in pairs.first] == ["x", "y"]


def test_documents_of_a_rerank() -> None:
    ask = task_bodies.rerank(RERANK | {"top_n": 9})
    assert (ask.documents, ask.top_n, ask.return_documents) == (["a", "b"], 2, True)
    assert not task_bodies.rerank(RERANK | {"return_documents": False}).return_documents


EMBED_REFUSED: list[tuple[Json, str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a", ""]}, "input[1]"),
    ({"input": [[]]}, "input[0]"),
    ({"input": ["a", 1]}, "input"),
    ({"input": [1, [2]]}, "input"),
    ({"input": [-1]}, "input[0]"),
    ({"input": [1.5]}, "input[0]"),
    ({"input": [2**32]}, "input[0]"),
    ({"input": None}, "input"),
    ({"input": {"text": "a"}}, "input"),
    ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
    ({"input": [[1]] * (MAX_INPUTS + 1)}, "input"),
    ({"model": ""}, "model"),
    ({"model": None}, "model"),
    ({"dimensions": 0}, "dimensions"),
    ({"dimensions": "8"}, "dimensions"),
    ({"encoding_format": "hex"}, "encoding_format"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"inputs": "a"}, "inputs"),
    ({"stream": True}, "stream"),
]
SCORE_REFUSED: list[tuple[Json, str]] = [
    ({"text_1": ""}, "text_1"),
    ({"text_2": []}, "text_2"),
    ({"text_2": ["a", ""]}, "text_2[1]"),
    ({"text_1": ["a", "b", "c"]}, "text_1"),
    ({"text_2": [1]}, "text_2[0]"),
    ({"text_2": math.nan}, "text_2"),
    ({"text_2": ["a"] * (MAX_INPUTS + 1)}, "text_2"),
]
RERANK_REFUSED: list[tuple[Json, str]] = [
    ({"query": ""}, "query"),
    ({"query": ["q"]}, "query"),
    ({"documents": "a"}, "documents"),
    ({"documents": [{"txt": "a"}]}, "documents[0].text"),
    ({"documents": ["a", {"text": ""}]}, "documents[1]"),
    ({"top_n": 0}, "top_n"),
]


@pytest.mark.parametrize(
    ("check", "body", "param"),
    [
        *((task_bodies.embedding, EMBED | change, param) for change, param in EMBED_REFUSED),
        *((task_bodies.score, SCORE | change, param) for change, param in SCORE_REFUSED),
        *((task_bodies.rerank, RERANK | change, param) for change, param in RERANK_REFUSED),
        *((check, {}, None) for check in (task_bodies.embedding, task_bodies.score, task_bodies.rerank)),
    ],
)
def test_refusals_name_the_field(check: Callable[[Json], object], body: Json, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(body)
    assert param is None or caught.value.param == param


@pytest.mark.parametrize(
    ("check", "body"),
    [
        (task_bodies.embedding, EMBED | {"input": ["x" * (MAX_TEXT_CHARS // 2)] * 3}),
        (task_bodies.score, SCORE | {"text_1": "x" * (MAX_TEXT_CHARS + 1)}),
        (task_bodies.rerank, RERANK | {"documents": ["x" * (MAX_TEXT_CHARS + 1)]}),
    ],
)
def test_texts_are_bounded_together(check: Callable[[Json], object], body: Json) -> None:
    with pytest.raises(PayloadTooLarge):
        check(body)

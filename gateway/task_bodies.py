"""The validator's part for vectors, labels and scores: a body goes in, what is asked for comes out.

HTTP and gRPC both call it. Pure. Bodies are OpenAI's (embeddings), vLLM's (classify, score), and what Jina and Cohere
have in common (rerank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta, Struct

from gateway.fields import BodyT, bound_text, convert, unknown
from gateway.schemas import MAX_TOKEN_IDS, Count, Name, TokenIds, UInt32
from llmos.errors import InvalidRequest

MAX_INPUTS = 2048
IGNORED_FIELDS = frozenset({"metadata", "priority", "safety_identifier", "user"})
"""Accepted and without effect, whatever their value."""

Inputs = str | Annotated[list[UInt32 | str | TokenIds], Meta(max_length=MAX_TOKEN_IDS)]


class TaskBody(Struct, kw_only=True, frozen=True):
    """What the bodies have in common."""

    model: Name
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] | None = None


class InputBody(TaskBody, kw_only=True, frozen=True):
    """Body of `POST /v1/classify`."""

    input: Inputs


class EmbeddingBody(InputBody, kw_only=True, frozen=True):
    """Body of `POST /v1/embeddings`."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None


class ScoreBody(TaskBody, kw_only=True, frozen=True):
    """Body of `POST /v1/score`."""

    text_1: str | list[str]
    text_2: str | list[str]


class Document(Struct, kw_only=True, frozen=True):
    """A text, as some clients wrap it."""

    text: str


class RerankBody(TaskBody, kw_only=True, frozen=True):
    """Body of `POST /v1/rerank`."""

    query: str
    documents: list[str | Document]
    top_n: Count | None = None
    return_documents: bool | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """A text, or its tokens, and what the client calls it."""

    content: str | tuple[int, ...]
    param: str


@dataclass(frozen=True, slots=True)
class InputsAsk:
    """Texts whose vectors or labels are wanted."""

    model: str
    inputs: Sequence[Input]
    truncate: int | None = None
    dimensions: int | None = None
    """Length of the vectors; None: the model's own."""
    base64: bool = False
    """How numbers are written."""


@dataclass(frozen=True, slots=True)
class ScoreAsk:
    """Pairs whose scores are wanted: `first` has one text for all, or as many as `second`."""

    model: str
    first: Sequence[Input]
    second: Sequence[Input]
    truncate: int | None = None


@dataclass(frozen=True, slots=True)
class RerankAsk:
    """A query and texts to be put in order."""

    score: ScoreAsk
    documents: Sequence[str]
    top_n: int
    return_documents: bool


def embedding(body: Mapping[str, object]) -> InputsAsk:
    """What a body of `POST /v1/embeddings` asks for."""
    checked = _checked(body, EmbeddingBody)
    return InputsAsk(
        model=checked.model,
        inputs=_inputs(checked.input),
        truncate=_truncate(checked),
        dimensions=checked.dimensions,
        base64=checked.encoding_format == "base64",
    )


def classification(body: Mapping[str, object]) -> InputsAsk:
    """What a body of `POST /v1/classify` asks for."""
    checked = _checked(body, InputBody)
    return InputsAsk(checked.model, _inputs(checked.input), _truncate(checked))


def score(body: Mapping[str, object]) -> ScoreAsk:
    """What a body of `POST /v1/score` asks for."""
    checked = _checked(body, ScoreBody)
    first, second = _texts(checked.text_1, "text_1"), _texts(checked.text_2, "text_2")
    if len(first) not in (1, len(second)):
        raise InvalidRequest("'text_1' must be one text, or as many as 'text_2'.", param="text_1")
    bound_text((str(text.content) for text in (*first, *second)), "text_2")
    return ScoreAsk(checked.model, first, second, _truncate(checked))


def rerank(body: Mapping[str, object]) -> RerankAsk:
    """What a body of `POST /v1/rerank` asks for."""
    checked = _checked(body, RerankBody)
    documents = [text if isinstance(text, str) else text.text for text in checked.documents]
    query, texts = _texts(checked.query, "query"), _texts(documents, "documents")
    bound_text((checked.query, *documents), "documents")
    return RerankAsk(
        score=ScoreAsk(checked.model, query, texts, _truncate(checked)),
        documents=documents,
        top_n=min(checked.top_n or len(documents), len(documents)),
        return_documents=checked.return_documents is not False,
    )


def _checked(body: Mapping[str, object], kind: type[BodyT]) -> BodyT:
    if not isinstance(body, Mapping):
        raise InvalidRequest("The body must be a JSON object.")
    known = {*kind.__struct_fields__, *IGNORED_FIELDS}
    for key in body:
        if key not in known:
            raise unknown(key, known, str(key))
    return convert(body, kind)


def _truncate(body: TaskBody) -> int | None:
    if body.truncate_prompt_tokens == 0:
        raise InvalidRequest(
            "'truncate_prompt_tokens' must be a number of tokens, or -1 for what the model takes.",
            param="truncate_prompt_tokens",
        )
    return body.truncate_prompt_tokens


def _inputs(given: str | Sequence[int | str | list[int]]) -> list[Input]:
    """One entry per text; a list of numbers is one text."""
    if isinstance(given, str):
        return _filled([Input(given, "input")])
    if given and all(isinstance(part, int) for part in given):
        return [Input(tuple(part for part in given if isinstance(part, int)), "input")]
    if len({type(part) for part in given}) > 1:
        raise InvalidRequest("'input' must not mix texts, token ids and lists.", param="input")
    _count(given, "input")
    bound_text((part for part in given if isinstance(part, str)), "input")
    listed = [part if isinstance(part, str) else tuple(part) for part in given if not isinstance(part, int)]
    return _filled([Input(part, f"input[{number}]") for number, part in enumerate(listed)])


def _texts(given: str | Sequence[str], param: str) -> list[Input]:
    if isinstance(given, str):
        return _filled([Input(given, param)])
    _count(given, param)
    return _filled([Input(text, f"{param}[{number}]") for number, text in enumerate(given)])


def _count(given: Sequence[object], param: str) -> None:
    if not 1 <= len(given) <= MAX_INPUTS:
        raise InvalidRequest(f"'{param}' has {len(given)} texts; 1 to {MAX_INPUTS} are possible.", param=param)


def _filled(inputs: list[Input]) -> list[Input]:
    for one in inputs:
        if not one.content:
            raise InvalidRequest(f"'{one.param}' must not be empty.", param=one.param)
    return inputs

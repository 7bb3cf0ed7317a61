"""Vectors, labels and scores of many texts: a request of its own for each, a bounded number of them at a time.

The first that fails ends all. Whoever awaits a method here and goes away takes everything that still runs with it.
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Literal

from gateway.task_bodies import Input, InputsAsk, ScoreAsk
from gateway.types import Delta, Done, Engine, Identity, ModelInfo, Started, TaskRequest, TraceHeaders
from llmos.errors import DeadlineExceeded, InternalError, InvalidRequest, ModelNotFound, UnsupportedFeature

AT_A_TIME = 64
"""Requests of one call that run at once: enough to fill an engine's steps, few beside a gateway's limit."""


@dataclass(frozen=True, slots=True)
class Call:
    """Who asks, and how."""

    identity: Identity
    request_id: str
    """The client's own, or empty."""
    trace: TraceHeaders
    deadline_s: float | None = None
    """Seconds that the client is willing to wait for everything."""


@dataclass(frozen=True, slots=True)
class Results:
    """Rows of numbers, one per text or pair, in their order."""

    request_id: str
    model: ModelInfo
    created_unix_s: int
    rows: Sequence[Sequence[float]]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class _Answer:
    started: Started
    values: Sequence[float]
    prompt_tokens: int


class Tasks:
    """What an engine makes of texts. Stateless."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def embed(self, ask: InputsAsk, call: Call) -> Results:
        """One vector per input."""
        model = self._model(ask.model, "embed")
        dimensions = ask.dimensions
        if dimensions is not None and dimensions not in model.dimensions:
            known = ", ".join(map(str, model.dimensions)) or "its own only"
            raise InvalidRequest(
                f"The model's vectors have no {dimensions} dimensions, but {known}.", param="dimensions"
            )
        results = await self._run(model, [_task("embed", one, ask) for one in ask.inputs], call)
        if dimensions in (None, next(iter(model.dimensions), None)):
            return results
        return replace(results, rows=[_shortened(row, dimensions) for row in results.rows])

    async def classify(self, ask: InputsAsk, call: Call) -> Results:
        """Per input one probability for each of the model's labels."""
        model = self._model(ask.model, "classify")
        return await self._run(model, [_task("classify", one, ask) for one in ask.inputs], call)

    async def score(self, ask: ScoreAsk, call: Call) -> Results:
        """One score per pair: by a cross-encoder from 0 to 1, else the cosine of the two texts' vectors."""
        model = self._model(ask.model, "score", "embed")
        if "score" in model.capabilities:
            pairs = [_pair(first, second, ask) for first, second in _pairs(ask)]
            return await self._run(model, pairs, call)
        places: dict[str | tuple[int, ...], int] = {}
        texts = [one for one in (*ask.first, *ask.second) if _is_new(places, one)]
        results = await self._run(model, [_task("embed", one, ask) for one in texts], call)
        vectors = [results.rows[places[one.content]] for one in (*ask.first, *ask.second)]
        first, second = vectors[: len(ask.first)], vectors[len(ask.first) :]
        firsts = first * len(second) if len(first) == 1 else first
        return replace(results, rows=[[_cosine(*pair)] for pair in zip(firsts, second, strict=True)])

    def _model(self, name: str, *capabilities: str) -> ModelInfo:
        """Raises ModelNotFound, or UnsupportedFeature where the model has none of the capabilities."""
        model = next((served for served in self._engine.models() if served.name == name), None)
        if model is None:
            raise ModelNotFound(f"The model '{name[:200]}' is not served here; list the models.", param="model")
        if model.capabilities.isdisjoint(capabilities):
            raise UnsupportedFeature(f"The model '{name}' does not offer {capabilities[0]}.", param="model")
        return model

    async def _run(self, model: ModelInfo, requests: Sequence[TaskRequest], call: Call) -> Results:
        timed = [replace(request, deadline_s=call.deadline_s) for request in requests]
        answers: list[_Answer | None] = [None] * len(timed)
        todo = iter(enumerate(timed))

        async def work() -> None:
            for number, request in todo:
                request_id = call.request_id
                if request_id and len(timed) > 1:
                    request_id = f"{request_id[:120]}-{number}"
                answers[number] = await self._answer(request, request_id, call)

        try:
            async with asyncio.timeout(call.deadline_s), asyncio.TaskGroup() as group:
                for _ in range(min(AT_A_TIME, len(timed))):
                    group.create_task(work())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        except TimeoutError:
            raise DeadlineExceeded("The request's deadline passed before it was finished.") from None
        done = [answer for answer in answers if answer is not None]
        return Results(
            request_id=call.request_id or done[0].started.request_id,
            model=model,
            created_unix_s=done[0].started.created_unix_s,
            rows=[answer.values for answer in done],
            prompt_tokens=sum(answer.prompt_tokens for answer in done),
        )

    async def _answer(self, request: TaskRequest, request_id: str, call: Call) -> _Answer:
        generation = await self._engine.generate(request, call.identity, request_id=request_id, trace=call.trace)
        started: Started | None = None
        values: Sequence[float] = ()
        try:
            async for event in generation.events():
                if isinstance(event, Started):
                    started = event
                elif isinstance(event, Delta):
                    values = event.values
                elif isinstance(event, Done) and started is not None and values:
                    return _Answer(started, values, event.prompt_tokens)
        finally:
            await generation.aclose()
        raise InternalError("a text without values")


def _task(kind: Literal["embed", "classify"], one: Input, ask: InputsAsk | ScoreAsk) -> TaskRequest:
    text, ids = (one.content, None) if isinstance(one.content, str) else (None, one.content)
    return TaskRequest(kind, ask.model, text, token_ids=ids, truncate=ask.truncate, param=one.param)


def _pair(first: Input, second: Input, ask: ScoreAsk) -> TaskRequest:
    texts = (str(first.content), str(second.content))
    return TaskRequest("score", ask.model, *texts, truncate=ask.truncate, param=second.param)


def _pairs(ask: ScoreAsk) -> Iterator[tuple[Input, Input]]:
    first = [*ask.first] * len(ask.second) if len(ask.first) == 1 else ask.first
    return zip(first, ask.second, strict=True)


def _is_new(places: dict[str | tuple[int, ...], int], one: Input) -> bool:
    """Note where a text's vector will be; a text that is asked about twice is computed once."""
    if one.content in places:
        return False
    places[one.content] = len(places)
    return True


def _shortened(vector: Sequence[float], length: int | None) -> Sequence[float]:
    """The first numbers of a vector that was trained for that, with length 1 again."""
    kept = vector[:length]
    norm = math.sqrt(math.fsum(map(mul, kept, kept)))
    return array("f", [value / norm for value in kept]) if norm else kept


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    norm = math.sqrt(math.fsum(map(mul, one, one)) * math.fsum(map(mul, other, other)))
    return math.fsum(map(mul, one, other)) / norm if norm else 0.0

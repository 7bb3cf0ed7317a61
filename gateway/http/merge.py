"""Several generations that share one answer, as OpenAI's completions do with a list of prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from gateway.types import (
    Delta,
    Done,
    Engine,
    Event,
    Generation,
    GenerationRequest,
    Identity,
    Sink,
    Started,
    TraceHeaders,
)

_QUEUE = 8
"""Events that wait per answer: enough to keep the parts going, few enough to pass back-pressure on."""


async def start_all(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    identity: Identity,
    *,
    request_id: str,
    trace: TraceHeaders,
) -> Generation:
    """Start every request; either all run or none does. Choices are numbered through, prompt by prompt."""
    if len(requests) == 1:
        return await engine.generate(requests[0], identity, request_id=request_id, trace=trace)
    started: list[Generation] = []
    try:
        for number, request in enumerate(requests):
            own_id = f"{request_id[:120]}-{number}" if request_id else ""
            part = replace(request, is_part=True)
            started.append(await engine.generate(part, identity, request_id=own_id, trace=trace))
    except BaseException:
        for generation in started:
            await generation.aclose()
        raise
    return MergedGeneration(started, [request.params.n for request in requests], request_id)


class MergedGeneration:
    """A Generation over several. The first that fails ends all."""

    def __init__(self, parts: Sequence[Generation], choices: Sequence[int], request_id: str) -> None:
        """`choices` is the number of choices of each part."""
        self._parts = parts
        self._offsets = [sum(choices[:number]) for number in range(len(parts))]
        self.request_id = request_id or parts[0].request_id
        self._queue: asyncio.Queue[Event | BaseException] = asyncio.Queue(_QUEUE)
        self._readers: list[asyncio.Task[None]] = []

    async def events(self) -> AsyncIterator[Event]:
        """See `Generation`."""
        self._readers = [
            asyncio.create_task(self._read(part, offset), name="merge-read")
            for part, offset in zip(self._parts, self._offsets, strict=True)
        ]
        starts, totals = 0, Done(0, 0)
        left = len(self._parts)
        while left:
            event = await self._queue.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Started):
                starts += 1
                if starts == 1:
                    yield replace(event, request_id=self.request_id)
            elif isinstance(event, Done):
                left -= 1
                totals = _sum(totals, event)
            else:
                yield event
        yield totals

    def feed(self, sink: Sink) -> None:
        """See `Generation`. Ignored: the parts share one order."""

    async def aclose(self, reason: str = "client_gone") -> None:
        """See `Generation`."""
        for part in self._parts:
            await part.aclose(reason)
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _read(self, part: Generation, offset: int) -> None:
        try:
            async for event in part.events():
                shifted = replace(event, choice=event.choice + offset) if isinstance(event, Delta) else event
                await self._queue.put(shifted)
        except Exception as error:
            await self._queue.put(error)


def _sum(one: Done, other: Done) -> Done:
    return Done(
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        one.cached_tokens + other.cached_tokens,
    )

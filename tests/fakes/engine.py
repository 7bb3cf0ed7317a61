"""An engine that says what a test wants: a scripted `gateway.types.Engine`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from gateway.types import (
    Delta,
    Done,
    Event,
    Finish,
    GenerationRequest,
    Identity,
    ModelInfo,
    Sink,
    Started,
    TaskRequest,
    TokenLogprob,
    TraceHeaders,
)
from llmos.errors import LlmosError, ModelNotFound

CREATED = 1_700_000_000
MODEL = ModelInfo("tiny", "v1", 128, frozenset({"chat", "completion"}), CREATED)


@dataclass
class Script:
    """What one generation does: say `pieces` (each a delta) in every choice, then finish or fail."""

    pieces: Sequence[str] = ("Hel", "lo ", "wor", "ld")
    finish: Finish = "stop"
    refuse: LlmosError | None = None
    """Raised by `generate`."""
    fail: BaseException | None = None
    """Raised by `events` in place of the finish."""
    fail_before_output: bool = False
    hold: asyncio.Event | None = None
    """Waited for after the first piece of each choice."""
    hold_start: asyncio.Event | None = None
    """Waited for before the first piece."""
    endless: str = ""
    """Said again and again instead of ever finishing."""
    forget_done: bool = False
    values: Sequence[float] = ()
    """Carried by the last delta."""


Asked = GenerationRequest | TaskRequest


class FakeGeneration:
    """A running script. `produced` counts its deltas, `closed` tells why it was closed."""

    def __init__(self, request: Asked, script: Script, request_id: str) -> None:
        self.request = request
        self.request_id = request_id
        self.script = script
        self.produced = 0
        self.ended = False
        self.closed = asyncio.Event()
        self.reason = ""
        self._tokens: dict[int, int] = {}

    async def events(self) -> AsyncIterator[Event]:
        script, request = self.script, self.request
        yield Started(self.request_id, request.model, "v1", 42, CREATED, 5)
        if script.hold_start is not None:
            await script.hold_start.wait()
        if script.fail is not None and script.fail_before_output:
            raise script.fail
        while script.endless:
            for choice in range(request.params.n):
                yield self._delta(choice, script.endless, None)
            await asyncio.sleep(0)
        for position, piece in enumerate(script.pieces):
            for choice in range(request.params.n):
                yield self._delta(choice, piece, None)
            if position == 0 and script.hold is not None:
                await script.hold.wait()
        if script.fail is not None:
            raise script.fail
        for choice in range(request.params.n):
            yield Delta(choice, self._tokens.get(choice, 0), "", (), (), script.finish, script.values)
        self.ended = True
        if not script.forget_done:
            yield Done(5, sum(self._tokens.values()), 2)

    def feed(self, sink: Sink) -> None:
        pass

    async def aclose(self, reason: str = "client_gone") -> None:
        self.reason = self.reason or reason
        self.closed.set()

    def _delta(self, choice: int, piece: str, finish: Finish | None) -> Delta:
        """One token per piece."""
        index = self._tokens.get(choice, 0)
        self._tokens[choice] = index + 1
        self.produced += 1
        wanted = self.request.params.logprobs
        logprobs = () if wanted is None else (_logprob(piece, wanted),)
        return Delta(choice, index, piece, (index,), logprobs, finish)


@dataclass
class FakeEngine:
    """Runs `script(request)` for each request and remembers what it was asked."""

    script: Callable[[Asked], Script] = field(default=lambda request: Script())
    served: Sequence[ModelInfo] = (MODEL,)
    is_ready: bool = True
    generations: list[FakeGeneration] = field(default_factory=list)
    identities: list[Identity] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    traces: list[TraceHeaders] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    began: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once a generation runs."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def generate(
        self, request: Asked, identity: Identity, *, request_id: str, trace: TraceHeaders
    ) -> FakeGeneration:
        self.identities.append(identity)
        self.request_ids.append(request_id)
        self.traces.append(trace)
        if all(model.name != request.model for model in self.served):
            raise ModelNotFound(f"The model '{request.model}' is not served here.", param="model")
        script = self.script(request)
        if script.refuse is not None:
            raise script.refuse
        generation = FakeGeneration(request, script, request_id or f"fake-{next(self._numbers)}")
        self.generations.append(generation)
        self.began.set()
        return generation

    async def wait_for(self, count: int) -> None:
        """Wait until so many generations have begun."""
        async with asyncio.timeout(10):
            while len(self.generations) < count:
                self.began.clear()
                await self.began.wait()

    async def cancel(self, request_id: str, identity: Identity) -> bool:
        self.cancelled.append(request_id)
        return any(one.request_id == request_id and not one.ended for one in self.generations)

    def models(self) -> Sequence[ModelInfo]:
        return self.served

    def ready(self) -> bool:
        return self.is_ready


def _logprob(piece: str, wanted: int) -> TokenLogprob:
    top = tuple(TokenLogprob(n, f"t{n}", f"t{n}".encode(), -float(n) if n else float("-inf")) for n in range(wanted))
    return TokenLogprob(0, piece, piece.encode(), -0.5, top)

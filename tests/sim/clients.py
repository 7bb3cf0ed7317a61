"""Clients: they know every token that they must get, and notice what is lost, repeated, changed or never ended."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from gateway.session_config import SessionConfig
from gateway.types import Delta, Done, GenerationRequest, Identity, Params, Progress, Started, TraceHeaders
from llmos.errors import LlmosError
from tests.sim.checks import Checks
from tests.sim.nodes import MODEL, SimGateway
from tests.sim.vloop import VirtualLoop
from worker.backends.echo import echo_token, prompt_digest

Habit = Literal["read", "cancel", "leave", "kill", "dawdle", "deadline"]
_RETRY_S = 0.25
_BEFORE_START = frozenset({"unavailable", "overloaded", "model_not_found", "conflict"})
_TENANTS = 3
_LONG = 450
_SMALL = 128
"""Tokens up to which three choices fit the smallest worker."""
_LEADER_GRACE_S = SessionConfig().leader_grace_s - 0.5


@dataclass(frozen=True, slots=True)
class Order:
    """What one client does: a value, so that a failing plan can be printed and shortened."""

    number: int
    at_s: float
    gateway: int
    prompt: tuple[int, ...]
    max_tokens: int
    choices: int
    seed: int
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    habit: Habit = "read"
    after: int = 0
    """Tokens after which it cancels, leaves or dawdles."""
    deadline_s: float | None = None
    priority: Literal["interactive", "standard", "batch"] = "standard"


def draw(rng: random.Random, number: int, span_s: float, gateways: int) -> Order:
    """A client by chance."""
    prompt = tuple(rng.randrange(32, 127) for _ in range(rng.choice((3, 20, 70, 140))))
    max_tokens = rng.choice((1, 8, 30, 60, 100, 160))
    seed = rng.getrandbits(31)
    habit: Habit = rng.choices(("read", "cancel", "leave", "kill", "dawdle", "deadline"), weights=(60, 8, 8, 10, 4, 5))[
        0
    ]
    if habit in ("cancel", "leave", "kill") and rng.random() < 0.5:
        prompt, max_tokens = prompt[:20], _LONG  # would still run at the end if nobody stopped it
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    if rng.random() < 0.25:
        at = rng.randrange(min(max_tokens, 100))
        text = "".join(map(chr, tokens_of(prompt, seed, 0, max_tokens)))
        stop = (text[at : at + rng.choice((1, 2, 3))],)
    elif rng.random() < 0.2:
        stop_tokens = (tokens_of(prompt, seed, 0, max_tokens)[rng.randrange(min(max_tokens, 100))],)
    return Order(
        number=number,
        at_s=rng.choice((0.3, 1.0, rng.uniform(0.0, span_s), rng.uniform(0.0, span_s))),
        gateway=rng.randrange(gateways),
        prompt=prompt,
        max_tokens=max_tokens,
        choices=rng.choice((1, 1, 1, 2, 3)) if len(prompt) + max_tokens <= _SMALL else 1,
        seed=seed,
        stop=stop,
        stop_tokens=stop_tokens,
        habit=habit,
        after=rng.randrange(min(max_tokens, 60)),
        deadline_s=rng.uniform(0.3, 4.0) if habit == "deadline" else None,
        priority=rng.choice(("interactive", "standard", "batch")),
    )


@cache
def tokens_of(prompt: tuple[int, ...], seed: int, choice: int, count: int) -> tuple[int, ...]:
    """What every worker produces."""
    digest = prompt_digest(prompt)
    return tuple(echo_token(digest, seed, choice, index) for index in range(count))


@dataclass(frozen=True, slots=True)
class Expected:
    """The whole of one choice."""

    tokens: tuple[int, ...]
    text: str
    finish: str


def expected(order: Order, choice: int) -> Expected:
    """By the rules of the API, computed without any of the code that is tested."""
    tokens = tokens_of(order.prompt, order.seed, choice, order.max_tokens)
    finish = "length"
    for index, token in enumerate(tokens):
        if token in order.stop_tokens:
            tokens, finish = tokens[: index + 1], "stop"
            break
    text = "".join(map(chr, tokens))
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in order.stop if stop and stop in text]
    if ends:
        end, begin = min(ends)
        return Expected(tokens[:end], text[:begin], "stop")
    return Expected(tokens, text, finish)


class _Gone(Exception):
    """The gateway's process is gone."""


@dataclass(eq=False)
class SimClient:
    """One client's life. `ended` is how it ended; empty while it has not."""

    order: Order
    gateways: list[SimGateway]
    loop: VirtualLoop
    checks: Checks
    ended: str = ""
    tokens: list[list[int]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    resumes: int = 0
    killed: bool = False
    """An operator has ended its request."""
    _started: bool = False
    """A public id is known, to resume by."""
    _begun: bool = False
    """The present gateway has accepted the request."""
    _ends: int = 0
    _inbox: deque[Any] = field(default_factory=deque)
    _ready: asyncio.Event = field(default_factory=asyncio.Event)
    _public_id: str = ""
    _turn: int = 0

    @property
    def name(self) -> str:
        return f"client{self.order.number}"

    @property
    def identity(self) -> Identity:
        return Identity(f"tenant{self.order.number % _TENANTS}", priority=self.order.priority)

    async def run(self) -> None:
        """Ask, read, check; ask again where the gateway is gone."""
        order = self.order
        self.tokens = [[] for _ in range(order.choices)]
        self.text = [""] * order.choices
        self.finishes = [""] * order.choices
        self._turn = order.gateway
        await asyncio.sleep(order.at_s)
        while not self.ended:
            gateway = self.gateways[self._turn % len(self.gateways)]
            if gateway.node.dead or gateway.sessions is None:
                await self._elsewhere()
                continue
            try:
                await self._attend(gateway)
            except _Gone:
                self.resumes += 1
                await self._elsewhere()
            except LlmosError as error:
                await self._refused(gateway, error)

    async def _elsewhere(self) -> None:
        self._turn += 1
        await asyncio.sleep(_RETRY_S)

    async def _attend(self, gateway: SimGateway) -> None:
        """One stream."""
        self._inbox.clear()
        self._begun = False
        gateway.on_kill.append(self._broken)
        handler = self.loop.spawn(gateway.node, self._serve(gateway), self.name)
        try:
            while not self.ended:
                await self._next(gateway)
        finally:
            if self._broken in gateway.on_kill:
                gateway.on_kill.remove(self._broken)
            handler.cancel()

    async def _serve(self, gateway: SimGateway) -> None:
        """The gateway's handler of this stream, in its process."""
        assert gateway.sessions is not None
        naps = [1.0, 2.0, 4.0]
        try:
            stream = await gateway.sessions.generate(
                self._request(), self.identity, request_id=self.name, trace=TraceHeaders()
            )
            async for event in stream.events():
                self._put(event)
                if self.order.habit == "dawdle" and sum(map(len, self.tokens)) >= self.order.after > 0:
                    await asyncio.sleep(naps.pop() if naps else 0)
        except LlmosError as error:
            self._put(error)

    def _request(self) -> GenerationRequest:
        order = self.order
        params = Params(
            max_tokens=order.max_tokens,
            seed=order.seed,
            stop=order.stop,
            stop_token_ids=order.stop_tokens,
            n=order.choices,
        )
        progress = tuple(
            Progress(choice, tuple(self.tokens[choice]), len(self.text[choice]), bool(self.finishes[choice]))
            for choice in range(order.choices)
            if self.tokens[choice] or self.finishes[choice]
        )
        return GenerationRequest(
            kind="completion",
            model=MODEL,
            params=params,
            token_ids=order.prompt,
            resume=progress,
            resume_request_id=self._public_id if self._started else "",
            deadline_s=order.deadline_s,
        )

    def _put(self, event: Any) -> None:
        self._inbox.append(event)
        self._ready.set()

    def _broken(self) -> None:
        self._put(_Gone())

    async def _next(self, gateway: SimGateway) -> None:
        while not self._inbox:
            self._ready.clear()
            await self._ready.wait()
        event = self._inbox.popleft()
        if isinstance(event, _Gone | LlmosError):
            raise event
        if isinstance(event, Started):
            self._started = self._begun = True
            self._public_id = event.request_id
        elif isinstance(event, Delta):
            self._delta(event)
        elif isinstance(event, Done):
            self._done(event)
        if not self.ended and self._started and sum(map(len, self.tokens)) >= self.order.after:
            await self._act(gateway)

    async def _act(self, gateway: SimGateway) -> None:
        habit = self.order.habit
        if habit == "leave":
            self._end("left")
        elif habit in ("cancel", "kill"):
            # `cancel` asks the gateway that serves it, `kill` another one, which asks the scheduler.
            ask = gateway if habit == "cancel" else self.gateways[(self._turn + 1) % len(self.gateways)]
            if ask.sessions is not None and not ask.node.dead:
                self.loop.spawn(ask.node, self._cancel(ask), f"{self.name}-cancel")

    async def _cancel(self, gateway: SimGateway) -> None:
        assert gateway.sessions is not None
        try:
            await gateway.sessions.cancel(self.name, self.identity)
        except LlmosError as error:
            self.checks.trace.say(f"{self.name}: cancel refused: {error.code}")

    def _delta(self, delta: Delta) -> None:
        have = self.tokens[delta.choice]
        full = expected(self.order, delta.choice)
        if self.finishes[delta.choice]:
            self.checks.fail("exactly one end", f"{self.name}: output after the end of choice {delta.choice}")
        if delta.index != len(have):
            self.checks.fail(
                "no token is lost or repeated", f"{self.name}: index {delta.index} follows {len(have)} tokens"
            )
        have.extend(delta.token_ids)
        self.text[delta.choice] += delta.text
        if tuple(have) != full.tokens[: len(have)]:
            self.checks.fail("no token is changed", f"{self.name}: choice {delta.choice} at {delta.index}")
        if not full.text.startswith(self.text[delta.choice]):
            self.checks.fail("no text is changed", f"{self.name}: choice {delta.choice} at {delta.index}")
        if delta.finish is not None:
            self.finishes[delta.choice] = delta.finish
        self.checks.counts["tokens_delivered"] += len(delta.token_ids)

    def _done(self, done: Done) -> None:
        for choice in range(self.order.choices):
            full = expected(self.order, choice)
            got = (tuple(self.tokens[choice]), self.text[choice], self.finishes[choice])
            if got != (full.tokens, full.text, full.finish):
                self.checks.fail("the same bytes", f"{self.name}: choice {choice}: {got[1:]} instead of {full}")
        if done.completion_tokens != sum(map(len, self.tokens)):
            self.checks.fail("usage counts what was delivered", f"{self.name}: {done.completion_tokens}")
        self._end("done")

    async def _refused(self, gateway: SimGateway, error: LlmosError) -> None:
        """An error may come before the start, or when this client or the world gave reason; else a stream was lost."""
        habit = self.order.habit
        if error.code == "cancelled" and (habit in ("cancel", "kill") or self.killed):
            self._end("cancelled")
        elif error.code == "deadline_exceeded" and habit == "deadline":
            self._end("deadline")
        elif error.code == "slow_reader" and habit == "dawdle":
            self._end("slow_reader")
        elif (not self._begun and error.code in _BEFORE_START) or self._excused(gateway, error):
            self.resumes += 1
            await self._elsewhere()
        else:
            self.checks.fail("no stream is lost", f"{self.name} at {gateway.name}: {error.code}: {error.message}")
            self._end("failed")

    def _excused(self, gateway: SimGateway, error: LlmosError) -> bool:
        """The scheduler's refusal, or a resumable error of a gateway that shuts down or had no leader for long."""
        if error.code in ("overloaded", "conflict", "request_quarantined"):
            return not any(self.tokens)
        alone = self.checks.gateways[gateway.name].longest_alone_s > _LEADER_GRACE_S
        return error.code == "unavailable" and (alone or gateway.stop.is_set())

    def _end(self, how: str) -> None:
        self._ends += 1
        if self._ends > 1:
            self.checks.fail("exactly one end", f"{self.name} ended twice")
        self.ended = how
        self.checks.counts[f"clients_{how}"] += 1
        self.checks.trace.say(f"{self.name} {how} after {sum(map(len, self.tokens))} tokens")

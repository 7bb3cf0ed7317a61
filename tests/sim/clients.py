"""Clients: they know every token that they must get, and notice what is lost, repeated, changed or never ended."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from gateway.session_config import SessionConfig
from gateway.types import Delta, Done, GenerationRequest, Held, Identity, Params, Progress, Started, TraceHeaders
from llmos.errors import LlmosError
from tests.sim.checks import Checks
from tests.sim.connections import Away, Connection, Gone
from tests.sim.nodes import MODEL, SimGateway
from tests.sim.orders import Break, Order, expected
from tests.sim.vloop import VirtualLoop

_RETRY_S = 0.25
_BEFORE_START = frozenset({"unavailable", "overloaded", "model_not_found", "conflict"})
_TENANTS = 3
_LEADER_GRACE_S = SessionConfig().leader_grace_s - 0.5
_ORPHAN_S = 2.0
"""A gateway that was killed is missed by the leader, which gives it a moment to come back."""
_LOSES_PATIENCE = 3


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
    """A public id is known, to come back by."""
    _by_request: bool = False
    """Nothing is remembered of its stream: it sends its request again."""
    _asked_cancel: bool = False
    _ends: int = 0
    _public_id: str = ""
    _turn: int = 0
    _impatient: int = 0
    _breaks: deque[Break] = field(default_factory=deque)
    _naps: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    _ghosts: list[Connection] = field(default_factory=list)
    """Connections that are lost without their gateways' knowledge."""
    _marks: list[list[tuple[int, int, str]]] = field(default_factory=list)
    """Where it was before each event: tokens, characters and end of every choice."""

    def __post_init__(self) -> None:
        self.rng = random.Random(f"client-{self.order.number}-{self.order.seed}")
        self._breaks.extend(self.order.breaks)

    @property
    def name(self) -> str:
        return f"client{self.order.number}"

    @property
    def identity(self) -> Identity:
        return Identity(f"tenant{self.order.number % _TENANTS}", priority=self.order.priority)

    @property
    def inner_id(self) -> str:
        """Name of its first request inside the fleet."""
        return f"{self.identity.tenant}/{self.name}"

    async def run(self) -> None:
        """Ask, read, check; come back where the gateway or the connection is gone."""
        order = self.order
        self.tokens = [[] for _ in range(order.choices)]
        self.text = [""] * order.choices
        self.finishes = [""] * order.choices
        self._turn = order.gateway
        await asyncio.sleep(order.at_s)
        try:
            while not self.ended:
                await self._once()
            if self.ended == "cancelled" and order.insists and self._started:
                await self._insist()
        finally:
            for ghost in self._ghosts:
                ghost.close()

    async def _once(self) -> None:
        """One connection, from the choice of a gateway to its end."""
        gateway = self.gateways[self._turn % len(self.gateways)]
        if gateway.node.dead or gateway.sessions is None:
            await self._elsewhere()
            return
        by_id = self.order.by_id and self._started and not self._by_request
        connection = Connection(gateway, by_id, self.checks.denied[self.identity.tenant, self._public_id])
        try:
            await self._attend(connection)
        except Gone:
            self.resumes += 1
            self._gone(_ORPHAN_S)
            await self._elsewhere()
        except Away as away:
            await self._away(away.how)
        except LlmosError as error:
            await self._refused(connection, error)

    async def _elsewhere(self) -> None:
        self._turn += 1
        await asyncio.sleep(_RETRY_S)

    async def _away(self, how: Break) -> None:
        """Its connection is lost, and a part of what came on it; after a while it comes back somewhere."""
        self.resumes += 1
        self.checks.counts["clients_cut"] += 1
        self.checks.trace.say(f"{self.name} is cut off{' silently' if how.silent else ''} for {how.away_s} s")
        for _ in range(min(how.forgets, len(self._marks))):
            self._roll_back(self._marks.pop())
        self._gone()
        await asyncio.sleep(how.away_s)
        self._turn += self.rng.random() < 0.7

    def _gone(self, more_s: float = 0.0) -> None:
        """From now on nothing is computed for it, as far as the fleet can know."""
        if not self._ghosts:
            self.checks.gone[self.inner_id] = self.loop.now + more_s

    def _roll_back(self, mark: list[tuple[int, int, str]]) -> None:
        for choice, (tokens, chars, finish) in enumerate(mark):
            del self.tokens[choice][tokens:]
            self.text[choice] = self.text[choice][:chars]
            self.finishes[choice] = finish

    async def _attend(self, connection: Connection) -> None:
        """One stream."""
        gateway = connection.gateway
        gateway.on_kill.append(connection.broken)
        self.checks.gone.pop(self.inner_id, None)
        connection.handler = self.loop.spawn(gateway.node, self._serve(connection), self.name)
        if self.order.stranger and self._started:
            self.loop.spawn(gateway.node, self._strange(gateway), f"stranger-{self.order.number}")
        silent = False
        try:
            while not self.ended:
                await self._next(connection)
        except Away as away:
            silent = away.how.silent
            raise
        finally:
            if connection.broken in gateway.on_kill:
                gateway.on_kill.remove(connection.broken)
            if silent:
                self._ghosts.append(connection)
            else:
                connection.close()
                self.checks.hung_up(connection)

    async def _serve(self, connection: Connection) -> None:
        """The gateway's handler of this stream, in its process."""
        try:
            stream = connection.stream = await self._open(connection)
            async for event in stream.events():
                connection.put(event)
                if self.order.habit == "dawdle" and sum(map(len, self.tokens)) >= self.order.after > 0:
                    await asyncio.sleep(self._naps.pop() if self._naps else 0)
        except LlmosError as error:
            connection.put(error)
        finally:
            if connection.stream is not None:
                await connection.stream.aclose()

    async def _open(self, connection: Connection) -> Any:
        sessions = connection.gateway.sessions
        assert sessions is not None
        trace = TraceHeaders()
        if connection.by_id:
            taken = await sessions.take_up(
                self._public_id, self.identity, self._held(), trace=trace, deadline_s=self.order.deadline_s
            )
            self.checks.counts["taken_up"] += 1
            return taken.generation
        return await sessions.generate(self._request(), self.identity, request_id=self.name, trace=trace)

    def _held(self) -> list[Held]:
        """What `Last-Event-ID` says."""
        return [
            Held(choice, len(self.tokens[choice]), len(self.text[choice]), bool(self.finishes[choice]))
            for choice in range(self.order.choices)
            if self.tokens[choice] or self.finishes[choice]
        ]

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
            Progress(held.choice, tuple(self.tokens[held.choice]), held.chars, held.ended) for held in self._held()
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

    async def _next(self, connection: Connection) -> None:
        patient = not (self.order.patience_s and self._started) or self._impatient >= _LOSES_PATIENCE
        try:
            async with asyncio.timeout(None if patient else self.order.patience_s):
                while not connection.inbox:
                    connection.ready.clear()
                    await connection.ready.wait()
        except TimeoutError:
            self._impatient += 1
            raise Away(Break(0, 0.05, silent=self.rng.random() < 0.5)) from None
        event = connection.inbox.popleft()
        if isinstance(event, Gone | LlmosError):
            raise event
        self._take(event, connection)
        if not self.ended and self._started and sum(map(len, self.tokens)) >= self.order.after:
            self._act(connection.gateway)
        if not self.ended and self._breaks and sum(map(len, self.tokens)) >= self._breaks[0].after:
            raise Away(self._breaks.popleft())

    def _take(self, event: Any, connection: Connection) -> None:
        if isinstance(event, Started):
            self._started = connection.begun = True
            self._by_request = False
            self._public_id = event.request_id
        elif isinstance(event, Delta):
            self._marks.append(
                [
                    (len(tokens), len(text), finish)
                    for tokens, text, finish in zip(self.tokens, self.text, self.finishes, strict=True)
                ]
            )
            self._delta(event)
        elif isinstance(event, Done):
            self._done(event)

    def _act(self, gateway: SimGateway) -> None:
        habit = self.order.habit
        if habit == "leave":
            self._end("left")
        elif habit in ("cancel", "kill"):
            # `cancel` asks the gateway that serves it, `kill` another one, which asks the scheduler.
            ask = gateway if habit == "cancel" else self.gateways[(self._turn + 1) % len(self.gateways)]
            if ask.sessions is not None and not ask.node.dead:
                self._asked_cancel = True
                self.loop.spawn(ask.node, self._cancel(ask), f"{self.name}-cancel")

    async def _cancel(self, gateway: SimGateway) -> None:
        assert gateway.sessions is not None
        try:
            await gateway.sessions.cancel(self.name, self.identity)
        except LlmosError as error:
            self.checks.trace.say(f"{self.name}: cancel refused: {error.code}")

    async def _strange(self, gateway: SimGateway) -> None:
        """Somebody of another tenant asks for the stream, by either of its names."""
        assert gateway.sessions is not None
        stranger = Identity(f"tenant{(self.order.number + 1) % _TENANTS}")
        for name in (self._public_id, self.inner_id):
            try:
                taken = await gateway.sessions.take_up(name, stranger, (), trace=TraceHeaders())
            except LlmosError as error:
                self.checks.counts[f"strangers_{error.code}"] += 1
            else:
                self.checks.fail("another tenant gets nothing", f"{self.name} was given to {stranger.tenant}")
                await taken.generation.aclose()

    async def _insist(self) -> None:
        """Ask for what was cancelled. The leader's books know whether anything may come of it."""
        await asyncio.sleep(_RETRY_S)
        gateway = self.gateways[(self._turn + 1) % len(self.gateways)]
        if gateway.sessions is None or gateway.node.dead:
            return
        connection = Connection(gateway, True, 0)
        connection.handler = self.loop.spawn(gateway.node, self._serve(connection), f"{self.name}-again")
        await asyncio.wait({connection.handler}, timeout=2.0)
        self.checks.counts["insisted"] += 1
        connection.close()

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

    async def _refused(self, connection: Connection, error: LlmosError) -> None:
        """An error may come before the start, or when this client or the world gave reason; else a stream was lost."""
        habit, code = self.order.habit, error.code
        if code == "cancelled" and (habit in ("cancel", "kill") or self.killed):
            self._end("cancelled")
        elif code == "deadline_exceeded" and habit == "deadline":
            self._end("deadline")
        elif code == "slow_reader" and habit == "dawdle" and not self.order.by_id:
            self._end("slow_reader")
        elif code == "request_quarantined":
            self._end("quarantined")  # whether engines of two workers have ended under it, the leader's books know
        elif code == "not_found" and connection.by_id:
            self._nothing(connection)
        elif (not connection.begun and code in _BEFORE_START) or self._excused(connection, error):
            self.resumes += 1
            await self._elsewhere()
        else:
            gateway = connection.gateway
            self.checks.fail("no stream is lost", f"{self.name} at {gateway.name}: {code}: {error.message}")
            self._end("failed")

    def _nothing(self, connection: Connection) -> None:
        """Nothing is remembered of its stream: it was cancelled, or the leader's books know why."""
        if self.checks.denied[self.identity.tenant, self._public_id] == connection.denied:
            self.checks.fail("what is remembered is given back", f"{self.name}: its gateway found nothing")
        self.checks.counts["not_found"] += 1
        if self._asked_cancel or self.killed:
            self._end("cancelled")
        else:
            self._by_request = True

    def _excused(self, connection: Connection, error: LlmosError) -> bool:
        """The scheduler's refusal, for which its books must know a cause, or a resumable error of a gateway that shuts
        down or had no leader for long; or another connection of the client's own, of which it knows no more, has the
        stream."""
        gateway, code = connection.gateway, error.code
        if code in ("overloaded", "conflict"):
            return not any(self.tokens) or (code == "conflict" and connection.by_id)
        if code == "slow_reader":
            return self.order.habit == "dawdle"
        if code == "cancelled":
            return any(ghost.overtakes(connection) for ghost in self._ghosts)
        if code == "unavailable" and self.checks.refused[self.inner_id]:
            self.checks.refused[self.inner_id] -= 1
            return True
        alone = self.checks.gateways[gateway.name].longest_alone_s > _LEADER_GRACE_S
        return code == "unavailable" and (alone or gateway.stop.is_set())

    def _end(self, how: str) -> None:
        self._ends += 1
        if self._ends > 1:
            self.checks.fail("exactly one end", f"{self.name} ended twice")
        self.ended = how
        if how != "done":
            self._gone()
        self.checks.counts[f"clients_{how}"] += 1
        self.checks.trace.say(f"{self.name} {how} after {sum(map(len, self.tokens))} tokens")

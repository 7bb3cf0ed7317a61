"""Keeps one member of the fleet running: notices its end and its hang, starts it again, renews it when told to.

One task per keeper (`run`) does all of that, one thing after another; others only give orders. Nothing happens
silently: each end, start and surrender is said by `notify` and stands in the fleet's state.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmos.clock import Clock
from llmos.errors import SetupError
from llmos.fleet.eyes import Eyes
from llmos.fleet.member import RunningMember, all_ready
from llmos.fleet.probe import can_look
from llmos.fleet.restarts import RestartHistory, RestartPolicy
from llmos.fleet.state import Member, MemberStatus, Role
from llmos.lifetime import EXIT_RESTART

_HURRY_S = 10.0
"""Between the signal to hurry and the end by force."""
TAKE_A_HINT: frozenset[Role] = frozenset({"gateway", "worker"})
"""Roles that drain, and that a second signal makes hurry."""


@dataclass(frozen=True, slots=True)
class Post:
    """A place in the fleet, whoever holds it."""

    name: str
    role: Role
    command: Callable[[Mapping[str, int]], list[str]]
    """Program and arguments, given the ports that the holder before had; empty: none was before."""
    log: Path
    ready_file: Path | None
    descriptors: tuple[int, ...] = ()
    """What its holders inherit: sockets that listen."""

    def fill(self, ports: Mapping[str, int]) -> RunningMember:
        """The next holder, not started."""
        if self.ready_file is not None:
            self.ready_file.unlink(missing_ok=True)
        fresh = RunningMember(
            self.name, self.role, self.command(ports), self.log, self.ready_file, descriptors=self.descriptors
        )
        if self.ready_file is None:  # it does not choose its ports
            fresh.ports = ports
        return fresh


@dataclass(frozen=True, slots=True)
class Care:
    """How a fleet looks after its members. Times in seconds."""

    probe_every_s: float = 2.0
    """Pause between two questions whether a member answers."""
    probe_timeout_s: float = 5.0
    """Longest wait for an answer."""
    misses: int = 3
    """Unanswered questions in a row after which a member hangs."""
    hung_grace_s: float = 3.0
    """Between SIGTERM and SIGKILL for one that hangs: if it only drains, the signal makes it hurry."""
    start_s: float = 300.0
    """Longest wait until a member that was started serves."""
    restarts: RestartPolicy = field(default_factory=RestartPolicy)
    """Pauses and the limit of starts."""


@dataclass(slots=True)
class Renewal:
    """An order to put a fresh process in a member's place."""

    patience_s: float
    """How long the old one may drain before it is told to hurry."""
    done: asyncio.Future[None]
    """Ends when the fresh one serves; SetupError if it does not."""


class Keeper:
    """Owns the processes of one post."""

    def __init__(
        self,
        post: Post,
        care: Care,
        eyes: Eyes,
        clock: Clock,
        notify: Callable[[str], None],
        changed: Callable[[], None],
        can_look: Callable[[], bool] = can_look,
    ) -> None:
        """`can_look` says whether a question that is not answered tells anything of the member."""
        self.member = post.fill({})
        self.post = post
        self.status: MemberStatus = "starting"
        self.restarts = 0
        """Starts after the first one, for whatever reason."""
        self.said = ""
        """Why it is not running, or was started again last; one line for people."""
        self._care = care
        self._eyes = eyes
        self._clock = clock
        self._notify = notify
        self._changed = changed
        self._can_look = can_look
        self._history = RestartHistory(care.restarts)
        self._renewal: Renewal | None = None
        self._ordered = asyncio.Event()
        self._old: RunningMember | None = None
        """The process before, while it drains beside its successor."""
        self._farewell: asyncio.Task[None] | None = None
        """Sees to its end."""
        self._started_at = 0.0

    async def start(self) -> None:
        """Start the first process; it serves later. Raises SetupError if it can't be started."""
        self._started_at = self._clock.monotonic()
        try:
            await self.member.start()
        except OSError as error:
            raise SetupError(f"{self.post.name} could not be started: {error.strerror}") from error

    def serves(self) -> None:
        """The first process serves: `run` may begin."""
        self.status = "running"

    def describe(self) -> Member:
        """Its line in the state file."""
        return self.member.describe(status=self.status, restarts=self.restarts, said=self.said)

    async def renew(self, patience_s: float) -> None:
        """Put a fresh process in its place, drained and taken over. Raises SetupError. Needs `run` to run."""
        self._renewal = Renewal(patience_s, asyncio.get_running_loop().create_future())
        self._ordered.set()
        await self._renewal.done

    async def stop(self, grace_s: float, hurry_s: float | None) -> None:
        """End every process of this post; see `RunningMember.stop`. `run` must have ended."""
        members = [member for member in (self._old, self.member) if member is not None]
        await asyncio.gather(*(member.stop(grace_s, hurry_s) for member in members))

    async def run(self) -> None:
        """From when it serves until cancelled."""
        try:
            while True:
                try:
                    ended = await self._watch()
                    await (self._revive(ended) if ended else self._obey())
                except OSError as error:  # this process itself lacks something
                    self._notify(f"{self.post.name} could not be looked after: {error.strerror}")
                    self._answer(SetupError(f"{self.post.name} could not be looked after: {error.strerror}"))
                    await asyncio.sleep(self._care.restarts.longest_pause_s)
        finally:
            if self._farewell is not None:
                self._farewell.cancel()
                await asyncio.gather(self._farewell, return_exceptions=True)

    async def _watch(self) -> str:
        """Wait for its end or its hang, and say what it was; empty: there is an order."""
        works: list[Coroutine[Any, Any, object]] = [self.member.wait_exit(), self._until_hung(), self._ordered.wait()]
        ended, hung, _ = tasks = [asyncio.create_task(work) for work in works]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return self.member.end_text()
            if not hung.done():
                return ""
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self.member.stop(self._care.hung_grace_s)
        return "did not answer any more and was ended"

    async def _until_hung(self) -> None:
        missed = 0
        while missed < self._care.misses:
            await asyncio.sleep(self._care.probe_every_s)
            if await self._answers():
                missed = 0
            elif self._can_look():
                missed += 1

    async def _answers(self) -> bool:
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no room for another thread
            return await self._eyes.alive(self.member, self._care.probe_timeout_s)
        return False

    async def _revive(self, ended: str) -> None:
        """Start it again, as often as the policy lets."""
        while ended:
            now, status = self._clock.monotonic(), self.member.exit_status or 0
            pause_s = self._history.ended(now, now - self._started_at, status)
            if pause_s is None:
                await self._give_up(ended)
            else:
                self._is("waiting", ended)
                soon = "now" if status == EXIT_RESTART or not pause_s else f"in {pause_s:g} s"
                self._notify(f"{self.post.name} {ended}; it is started again {soon} (log: {self.post.log})")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._ordered.wait()
            self.member = await self._launch()
            ended = await self._failure(self.member)
        self._notify(f"{self.post.name} serves again (restart {self.restarts})")
        self._is("running", self.said)
        self._answer(None)

    async def _give_up(self, ended: str) -> None:
        """Too many ends: wait for a person."""
        self._is("failed", f"{ended}, too often in a row")
        self._notify(
            f"{self.post.name} {ended}, too often in a row: the fleet goes on without it. See {self.post.log}; "
            f"`llmos restart {self.post.name}` tries it again"
        )
        self._answer(SetupError(f"{self.post.name} {ended}, too often in a row (log: {self.post.log})"))
        await self._ordered.wait()
        self._history.forgive()

    async def _obey(self) -> None:
        """Carry out a renewal. A gateway's successor serves before it goes, another's after."""
        renewal = self._renewal
        assert renewal is not None
        try:
            if self.post.role == "gateway":
                await self._hand_on(renewal)
            else:
                await self._replace(renewal)
        except SetupError as error:
            self._notify(error.message)
            self._answer(error)
        else:
            self._answer(None)

    async def _hand_on(self, renewal: Renewal) -> None:
        try:
            fresh = await self._start_next()
        except OSError as error:
            raise SetupError(f"a new {self.post.name} cannot be started now ({error.strerror})") from error
        failed = await self._failure(fresh)
        if failed:
            await fresh.stop(0.0)
            self._is("running", "")
            raise SetupError(f"the new {self.post.name} {failed}; the old one goes on (log: {self.post.log})")
        self._old, self.member = self.member, fresh
        self._is("running", "restarted by order")
        # The new one is watched while the old one's streams end, however long that takes.
        self._renewal = None
        self._ordered.clear()
        self._farewell = asyncio.create_task(self._see_off(self._old, renewal))

    async def _see_off(self, old: RunningMember, renewal: Renewal) -> None:
        failed: SetupError | None = None
        try:
            await old.stop(renewal.patience_s + _HURRY_S, renewal.patience_s)
        except OSError as error:
            failed = SetupError(f"a new {self.post.name} serves, but the old one cannot be ended ({error.strerror})")
            self._notify(failed.message)
        finally:
            self._old = None if self._old is old and old.exit_status is not None else self._old
            if not renewal.done.done():
                renewal.done.set_exception(failed) if failed else renewal.done.set_result(None)

    async def _replace(self, renewal: Renewal) -> None:
        before = await self._eyes.standing(self.member)
        self._is("draining", "restarted by order")
        hurry_s = renewal.patience_s if self.post.role in TAKE_A_HINT else None
        await self.member.stop(renewal.patience_s + _HURRY_S, hurry_s)
        self.member = await self._launch()
        failed = await self._failure(self.member, before)
        if failed:
            # Whether it comes up later or not, `run` goes on with it.
            if self.member.exit_status is None:
                self._is("running", self.said)
            raise SetupError(f"the new {self.post.name} {failed} (log: {self.post.log})")
        self._is("running", self.said)

    async def _launch(self) -> RunningMember:
        """Start the next process, as soon as that can be done: what the host lacks now it may have in a moment."""
        pause_s, before = self._care.restarts.first_pause_s, ""
        while True:
            try:
                return await self._start_next()
            except OSError as error:
                said = f"{self.post.name} cannot be started now ({error.strerror})"
            self._answer(SetupError(f"{said}; it is tried again"))
            if said != before:
                before = said
                self._notify(f"{said}; it is tried again")
                self._is("waiting", said)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._care.restarts.longest_pause_s)

    async def _start_next(self) -> RunningMember:
        """Raises OSError."""
        fresh = self.post.fill(self.member.ports)
        self._started_at = self._clock.monotonic()
        await fresh.start()
        self.restarts += 1
        self._is("starting", self.said)
        return fresh

    async def _failure(self, fresh: RunningMember, before: frozenset[str] | None = None) -> str:
        """Wait until a new process serves, with `before` the whole fleet; empty if it does, else what became of it."""
        try:
            async with asyncio.timeout(self._care.start_s):
                await all_ready([fresh])
                await self._eyes.settled(fresh, before)
        except SetupError:
            return fresh.end_text()
        except TimeoutError:
            if before is not None and fresh.ports:
                return f"serves, but not all that was served before within {self._care.start_s:g} s"
            await fresh.stop(self._care.hung_grace_s)
            return f"did not serve within {self._care.start_s:g} s"
        return ""

    def _answer(self, error: SetupError | None) -> None:
        """Whoever gave an order learns what came of it."""
        renewal, self._renewal = self._renewal, None
        self._ordered.clear()
        if renewal is None or renewal.done.done():
            return
        if error is None:
            renewal.done.set_result(None)
        else:
            renewal.done.set_exception(error)

    def _is(self, status: MemberStatus, said: str) -> None:
        self.status, self.said = status, said
        self._changed()

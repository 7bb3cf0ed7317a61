"""An asyncio event loop whose time is a number: nothing sleeps, and the same program runs the same way each time.

Every task belongs to a node, by a context variable. A node that is frozen gets no turn, like a process under SIGSTOP;
one that was killed never gets one again, like a process under SIGKILL: not even its `finally` blocks run.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

START = 1000.0
_EPILOGUE_S = 30.0
_PRUNE = 512


@dataclass(eq=False, slots=True)
class Node:
    """A simulated process."""

    name: str
    frozen: bool = False
    dead: bool = False
    asleep: bool = False
    """Frozen or dead: its callbacks are kept from running."""
    held: list[Turn] = field(default_factory=list)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def __post_init__(self) -> None:
        self.context.run(_NODE.set, self)


_NODE: contextvars.ContextVar[Node | None] = contextvars.ContextVar("node", default=None)
NOWHERE = contextvars.Context()
"""For callbacks of the world itself: wires, faults."""


def current_node() -> Node | None:
    """Whose turn it is; None for the world itself."""
    return _NODE.get()


class Deadlock(Exception):
    """Nothing is left to happen, and what was waited for has not."""


class SimTask(asyncio.Task[Any]):
    """Hashes by its number, not by its address: sets of tasks, which asyncio makes, are walked in one order."""

    number: int

    def __hash__(self) -> int:
        return self.number


class VirtualClock:
    """Implements `llmos.clock.Clock` on the loop's time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.now

    def unix_ns(self) -> int:
        return int(self._loop.now * 1e9)


class VirtualLoop(asyncio.BaseEventLoop):
    """Jumps to the next timer whenever nothing is ready. Callbacks run in the order in which they became ready."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.steps = 0
        """Callbacks run so far."""
        self._serial = self._serial_timer = 0
        self._timers: list[tuple[float, int, Turn]] = []
        self._live: list[SimTask] = []
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self.now

    def spawn(self, node: Node, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run a coroutine as part of a node."""
        return self.create_task(work, name=name, context=node.context)

    def freeze(self, node: Node) -> None:
        """SIGSTOP."""
        node.frozen = node.asleep = True

    def thaw(self, node: Node) -> None:
        """SIGCONT: what fell due meanwhile runs now."""
        node.frozen = False
        node.asleep = node.dead
        if not node.asleep:
            self._ready.extend(node.held)  # type: ignore[attr-defined]
            node.held.clear()

    def kill(self, node: Node) -> None:
        """SIGKILL."""
        node.dead = node.asleep = True

    def finish(self, nodes: list[Node]) -> None:
        """End every task, those of killed nodes too, so that nothing is left for the garbage collector."""
        for node in nodes:
            node.dead = node.frozen = node.asleep = False
            self._ready.extend(node.held)  # type: ignore[attr-defined]
            node.held.clear()
        limit = self.now + _EPILOGUE_S
        while left := [task for task in self._live if not task.done()]:
            if self.now > limit:
                raise Deadlock(f"cannot be cancelled: {[task.get_name() for task in left[:5]]}")
            for task in left:
                task.cancel()
            self.run_until_complete(asyncio.wait(left, timeout=1.0))
        for task in self._live:
            if not task.cancelled():
                task.exception()  # marks it as seen

    def _make_task(self, loop: Any, work: Any, context: contextvars.Context | None = None) -> SimTask:
        self._serial += 1
        task = SimTask.__new__(SimTask)  # its constructor hashes it
        task.number = self._serial
        task.__init__(work, loop=loop, context=context)  # type: ignore[misc]
        self._live.append(task)
        if len(self._live) % _PRUNE == 0:
            self._live = [one for one in self._live if not one.done()]
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Threads would not be deterministic: done at once."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    # asyncio.BaseEventLoop's own, without what costs time and is of no use here

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        turn = Turn(callback, args, contextvars.copy_context() if context is None else context)
        self._ready.append(turn)  # type: ignore[attr-defined]
        return turn

    call_soon_threadsafe = call_soon  # there is one thread; generators that are dropped come this way

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        turn = Turn(callback, args, contextvars.copy_context() if context is None else context)
        turn.at = when
        self._serial_timer += 1
        heapq.heappush(self._timers, (when, self._serial_timer, turn))
        return turn

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def _process_events(self, event_list: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        if not ready:
            while timers and timers[0][2].is_cancelled:
                heapq.heappop(timers)
            if not timers:
                raise Deadlock("nothing is left to happen")
            self.now = max(self.now, timers[0][0])
        now = self.now
        while timers and timers[0][0] <= now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            turn = ready.popleft()
            if turn.is_cancelled:
                continue
            node = turn.context.get(_NODE)
            if node is not None and node.asleep:
                node.held.append(turn)
                continue
            self.steps += 1
            try:
                turn.context.run(turn.callback, *turn.args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.call_exception_handler({"message": f"in {turn.callback}", "exception": error})


class Turn:
    """A callback that is to run: what asyncio calls a handle."""

    __slots__ = ("args", "at", "callback", "context", "is_cancelled")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...], context: contextvars.Context) -> None:
        self.callback, self.args, self.context = callback, args, context
        self.is_cancelled = False
        self.at = 0.0

    def cancel(self) -> None:
        """It will not run."""
        self.is_cancelled = True

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self.is_cancelled

    def when(self) -> float:
        """Time of a timer."""
        return self.at

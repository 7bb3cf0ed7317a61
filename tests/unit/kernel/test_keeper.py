"""A keeper among members that cannot be started, cannot be seen, or take long to go; without processes."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from llmos.errors import SetupError
from llmos.fleet import eyes, probe
from llmos.fleet.eyes import ServiceEyes
from llmos.fleet.keeper import Care, Keeper
from llmos.fleet.member import RunningMember
from llmos.fleet.restarts import RestartPolicy
from llmos.fleet.state import Role
from llmos.v1 import fleet_pb2
from tests.fakes.clock import ManualClock

CARE = Care(
    probe_every_s=0.001,
    misses=2,
    hung_grace_s=0.0,
    start_s=5.0,
    restarts=RestartPolicy(first_pause_s=0.001, longest_pause_s=0.002, limit=3),
)
NO_FILES = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class FakeMember:
    """Runs until it is stopped; `may_end` lets it."""

    def __init__(self, post: FakePost, number: int) -> None:
        self.post, self.number = post, number
        self.ports: Mapping[str, int] = {"port": 1}
        self.id = f"m{number}"
        self.exit_status: int | None = None
        self.ended = asyncio.Event()
        self.may_end = asyncio.Event()

    async def start(self) -> None:
        if self.post.refusals:
            raise self.post.refusals.pop()
        self.post.started.append(self)

    def end(self, status: int) -> None:
        self.exit_status = status
        self.ended.set()

    async def wait_exit(self) -> int:
        await self.ended.wait()
        return self.exit_status or 0

    async def stop(self, grace_s: float, hurry_s: float | None = None) -> None:
        if self.post.cannot_stop is not None:
            raise self.post.cannot_stop
        if hurry_s is not None:
            await self.may_end.wait()
        if self.exit_status is None:
            self.end(0)

    def poll_ready(self) -> bool:
        return True

    def end_text(self) -> str:
        return f"ended with status {self.exit_status}"


@dataclass
class FakePost:
    role: Role = "worker"
    name: str = "one"
    log: Path = Path("one.log")
    refusals: list[OSError] = field(default_factory=list)
    cannot_stop: OSError | None = None
    started: list[FakeMember] = field(default_factory=list)
    filled: int = 0

    def fill(self, ports: Mapping[str, int]) -> FakeMember:
        self.filled += 1
        return FakeMember(self, self.filled)


@dataclass
class FakeEyes:
    answers: Callable[[], bool] = lambda: True
    looks: int = 0

    async def alive(self, member: RunningMember, timeout_s: float) -> bool:
        self.looks += 1
        return self.answers()

    async def standing(self, member: RunningMember) -> frozenset[str]:
        return frozenset({"a model"})

    async def settled(self, member: RunningMember, before: frozenset[str] | None) -> None:
        return None


@asynccontextmanager
async def kept(
    post: FakePost, sight: Any = None, *, care: Care = CARE, can_look: Callable[[], bool] = lambda: True
) -> AsyncIterator[tuple[Keeper, list[str]]]:
    notes: list[str] = []
    keeper = Keeper(
        cast("Any", post), care, sight or FakeEyes(), ManualClock(), notes.append, lambda: None, can_look=can_look
    )
    await keeper.start()
    keeper.serves()
    task = asyncio.create_task(keeper.run())
    try:
        yield keeper, notes
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - tasks decide
            await asyncio.sleep(0.001)


async def test_who_cannot_be_started_now_is_tried_again_and_not_given_up() -> None:
    post = FakePost()
    async with kept(post) as (keeper, notes):
        post.refusals = [NO_FILES] * 20
        post.started[0].end(1)
        await until(lambda: keeper.status == "running" and len(post.started) == 2)
    assert post.filled == 22
    assert keeper.restarts == 1
    assert [note for note in notes if "cannot be started now" in note] == [
        "one cannot be started now (Too many open files); it is tried again"
    ]


async def test_a_replacement_that_cannot_be_started_answers_the_order_and_comes_later() -> None:
    post = FakePost()
    async with kept(post) as (keeper, _):
        post.refusals = [NO_FILES] * 3
        post.started[0].may_end.set()
        with pytest.raises(SetupError, match="cannot be started now"):
            await keeper.renew(1.0)
        await until(lambda: keeper.status == "running" and len(post.started) == 2)


async def test_a_gateway_goes_on_where_its_successor_cannot_be_started() -> None:
    post = FakePost("gateway")
    async with kept(post) as (keeper, _):
        post.refusals = [NO_FILES]
        with pytest.raises(SetupError, match="cannot be started now"):
            await keeper.renew(1.0)
        assert cast("Any", keeper.member) is post.started[0]
        assert keeper.status == "running"


async def test_a_new_gateway_is_watched_while_the_old_one_lets_its_streams_end() -> None:
    post = FakePost("gateway")
    async with kept(post) as (keeper, _):
        renewal = asyncio.create_task(keeper.renew(600.0))
        await until(lambda: len(post.started) == 2)
        await until(lambda: keeper.status == "running")
        post.started[1].end(9)
        await until(lambda: len(post.started) == 3 and keeper.status == "running")
        assert not renewal.done()
        assert post.started[0].exit_status is None
        post.started[0].may_end.set()
        await renewal


async def test_an_old_gateway_that_cannot_be_ended_is_said_and_not_forgotten() -> None:
    post = FakePost("gateway")
    async with kept(post) as (keeper, notes):
        post.cannot_stop = OSError(errno.EPERM, os.strerror(errno.EPERM))
        with pytest.raises(SetupError, match="the old one cannot be ended"):
            await keeper.renew(1.0)
        assert "cannot be ended" in notes[-1]
        post.cannot_stop = None
        await keeper.stop(0.0, None)
        assert post.started[0].exit_status == 0


async def test_who_cannot_look_takes_nobody_for_hung() -> None:
    post, sight = FakePost(), FakeEyes(lambda: False)
    able = False
    async with kept(post, sight, can_look=lambda: able) as (keeper, _):
        await until(lambda: sight.looks > 10)
        assert keeper.restarts == 0
        able = True
        await until(lambda: keeper.restarts > 0)


def test_without_descriptors_nothing_can_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.can_look()

    def refuse(path: str, flags: int) -> int:
        raise NO_FILES

    monkeypatch.setattr("llmos.fleet.probe.os.open", refuse)
    assert not probe.can_look()


async def test_a_worker_that_is_not_told_to_load_what_its_forerunner_had_is_let_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    post = FakePost("worker")
    states = [fleet_pb2.MODEL_STATE_LOADING] * 5 + [fleet_pb2.MODEL_STATE_AVAILABLE]

    async def nodes(port: int) -> list[fleet_pb2.Node]:
        extra = fleet_pb2.NodeModel(name="extra", state=states.pop(0) if len(states) > 1 else states[0])
        base = fleet_pb2.NodeModel(name="base", state=fleet_pb2.MODEL_STATE_LOADED)
        if len(post.started) == 1:  # the forerunner was told to load more than the fleet needs now
            extra.state = fleet_pb2.MODEL_STATE_LOADED
        return [fleet_pb2.Node(id=post.started[-1].id, models=[base, extra])]

    monkeypatch.setattr(eyes, "_nodes", nodes)
    monkeypatch.setattr(eyes, "_POLL_S", 0.001)
    monkeypatch.setattr(eyes, "_DECIDED_S", 0.01)

    class Sight(ServiceEyes):
        async def alive(self, member: RunningMember, timeout_s: float) -> bool:
            return True

    scheduler = FakeMember(FakePost("scheduler"), 0)
    scheduler.role = "scheduler"  # type: ignore[attr-defined]
    sight = Sight(lambda: [cast("RunningMember", scheduler)])
    monkeypatch.setattr(FakeMember, "role", "worker", raising=False)
    async with kept(post, sight) as (keeper, _):
        post.started[0].may_end.set()
        await keeper.renew(1.0)
        assert len(states) == 1, "it was waited for while it loaded"
        assert post.started[1].exit_status is None
        assert keeper.status == "running"

"""The Work service's stream: what goes wrong in it is heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from llmos.errors import StaleTerm
from llmos.internal.v1 import work_pb2
from tests.unit.worker.rig import Rig, batch, hello
from worker import service
from worker.service import WorkService


async def test_a_stream_that_is_replaced_at_the_very_heartbeat_sends_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # A frame taken for the old stream would be missing in the new one's count.
    monkeypatch.setattr(service, "HEARTBEAT_S", 0.0)
    stream = service.SchedulerStream(1)
    asyncio.get_running_loop().call_soon(stream.replace, StaleTerm("A newer one took over."))
    with pytest.raises(StaleTerm):
        await stream.turn()


async def test_a_heartbeat_is_due_without_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "HEARTBEAT_S", 0.0)
    stream = service.SchedulerStream(1)
    assert await stream.turn()
    stream.end(None)
    assert not await stream.turn()


async def test_a_bug_in_a_command_ends_the_stream_with_that_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(attach=False)
    rig.ready()

    def bug(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(rig.core, "receive", bug)

    async def requests() -> AsyncIterator[work_pb2.AttachRequest]:
        yield batch(hello())
        yield batch()
        await asyncio.Event().wait()

    answers = WorkService(rig.core, []).Attach(requests(), cast(Any, None))
    assert (await anext(answers)).HasField("report")
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(10):
            async for _ in answers:
                pass

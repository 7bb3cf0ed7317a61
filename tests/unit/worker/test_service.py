"""The Work service's stream: what goes wrong in it is heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from llmos.internal.v1 import work_pb2
from tests.unit.worker.rig import Rig, batch, hello
from worker.service import WorkService


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

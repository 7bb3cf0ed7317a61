"""The gateway's own spans of a request."""

from __future__ import annotations

from tests.integration.gateway_grpc.conftest import NewScheduler
from tests.integration.gateway_grpc.gateway import ALICE, running


async def test_a_cancelled_request_ends_its_wait_with_the_reason(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        stream = await gateway.chat("hello")
        await gateway.sessions.cancel(stream.request_id, ALICE)
        await scheduler.until(lambda: len(scheduler.spans) >= 3)
    errors = {span.name: span.error for span in scheduler.spans}
    assert errors == {"tokenize": "", "first_output": "cancelled", "text_completion echo": "cancelled"}

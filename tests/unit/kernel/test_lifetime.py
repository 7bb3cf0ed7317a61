"""Signals and exit statuses of a service process."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from llmos import lifetime
from llmos.errors import ConfigError, EtcdAuthFailed, EtcdUnavailable, InternalError, LlmosError, ModelNotFound
from llmos.lifetime import EXIT_RESTART, Stop, first_of, run_until_signal


@pytest.fixture(autouse=True)
def _collector_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetime, "spare_the_collector", lambda: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_stops_and_a_second_one_hurries(number: signal.Signals) -> None:
    seen: list[tuple[bool, bool]] = []

    async def serve(stop: Stop) -> None:
        for event in (stop, stop.hurry):
            seen.append((stop.is_set(), stop.hurry.is_set()))
            os.kill(os.getpid(), number)
            await asyncio.wait_for(event.wait(), 5)

    assert run_until_signal(serve) == 0
    assert seen == [(False, False), (True, False)]


def test_a_service_may_ask_to_be_started_afresh() -> None:
    async def serve(stop: Stop) -> None:
        stop.status = EXIT_RESTART

    assert run_until_signal(serve) == 75


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2),
        (ModelNotFound("x"), 2),
        (EtcdAuthFailed("x"), 2),
        (EtcdUnavailable("x"), 1),
        (InternalError("x"), 1),
    ],
)
def test_an_error_says_whether_starting_again_can_help(error: LlmosError, status: int) -> None:
    async def serve(stop: Stop) -> None:
        raise error

    assert run_until_signal(serve) == status


async def test_the_first_of_several_events() -> None:
    one, other = asyncio.Event(), asyncio.Event()
    assert not await first_of(one, other, timeout_s=0)
    other.set()
    assert await first_of(one, other)

"""The live view, driven by textual's pilot against a real gRPC server with canned answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from textual.widgets import Label

from llmos.cli.connection import Target
from llmos.cli.top_app import TopApp
from llmos.cli.top_snapshot import Fleet
from llmos.v1 import fleet_pb2
from tests.fakes.scripted_gateway import ScriptedGateway, scripted_gateway

WAIT_S = 20.0


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as gateway:
        yield gateway


async def opened(gateway: ScriptedGateway, target: Callable[[], Target] | None = None) -> TopApp:
    fleet = Fleet(target or (lambda: Target(gateway.address)), timeout_s=5.0)
    return TopApp(fleet, await fleet.look(), 0.05)


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that the view does in its own time."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def asked(gateway: ScriptedGateway, kind: type) -> list[object]:
    return [request for request in gateway.asked if isinstance(request, kind)]


def headline(app: TopApp) -> str:
    return str(app.query_one("#headline", Label).render())


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
async def test_it_shows_everything_and_keeps_looking(gateway: ScriptedGateway, size: tuple[int, int]) -> None:
    app = await opened(gateway)
    async with app.run_test(size=size):
        await until(lambda: app.looks >= 3)
        assert "1/1 workers · 1 running · 2 waiting · 40 tokens/s" in headline(app)
        for name in ("workers", "models", "queues", "requests"):
            table = app.query_one(f"#{name}")
            assert table.row_count == 1  # type: ignore[attr-defined]
            assert table.region.height >= 2
            assert table.region.bottom <= size[1]


async def test_kill_nice_and_drain_ask_first(gateway: ScriptedGateway) -> None:
    app = await opened(gateway)
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.press("k", "n")
        await pilot.press("k", "y")
        await until(lambda: asked(gateway, fleet_pb2.KillRequestRequest))
        await pilot.press("n", "down", "down", "enter")
        await until(lambda: asked(gateway, fleet_pb2.SetRequestPriorityRequest))
        await pilot.press("d", "n")
        await pilot.press("d", "y")
        await until(lambda: asked(gateway, fleet_pb2.DrainNodeRequest))
        await pilot.press("u", "y")
        await until(lambda: len(asked(gateway, fleet_pb2.DrainNodeRequest)) == 2)
    assert [request.request_id for request in asked(gateway, fleet_pb2.KillRequestRequest)] == ["r1"]  # type: ignore[attr-defined]
    (moved,) = asked(gateway, fleet_pb2.SetRequestPriorityRequest)
    assert moved.priority == fleet_pb2.PRIORITY_CLASS_BATCH  # type: ignore[attr-defined]
    requests = asked(gateway, fleet_pb2.DrainNodeRequest)
    assert [(r.node_id, r.undo) for r in requests] == [("w1", False), ("w1", True)]  # type: ignore[attr-defined]


async def test_it_goes_on_after_the_fleet_was_away(gateway: ScriptedGateway) -> None:
    there = [True]
    app = await opened(gateway, lambda: Target(gateway.address if there[0] else "127.0.0.1:1"))
    async with app.run_test(size=(100, 40)):
        there[0] = False
        await until(lambda: "reconnecting" in headline(app))
        there[0] = True
        await until(lambda: "1/1 workers" in headline(app))


async def test_pause_holds_the_view(gateway: ScriptedGateway) -> None:
    app = await opened(gateway)
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.press("p")
        assert "paused" in headline(app)
        await pilot.press("p")
        looks = app.looks
        await until(lambda: app.looks > looks)

"""What happens to gateways, and every process restarted one after another."""

from __future__ import annotations

from tests.faults.acts import kill, pause, restart, some, term
from tests.faults.scenario import Act, Event, Load, Scenario
from tests.faults.world import World

BROKEN = frozenset({"ReadError", "ConnectError", "RemoteProtocolError"})
"""What the short requests of a killed gateway's clients see; streams come back."""


def rolling() -> Act:
    """SIGTERM and a new process, for every service of the fleet in turn."""

    async def act(world: World) -> None:
        for service in list(world.fleet.services):
            world.injected_now()
            world.chosen["next"] = service
            await term(some(service.role, "next"))(world)
            await restart(some(service.role, "next"))(world)
            await world.fleet.wait_whole()

    return act


SCENARIOS = (
    Scenario(
        "gateway killed",
        "gateway restart",
        (
            Event("SIGKILL to a gateway, its clients go to the other", kill(some("gateway")), tokens=20),
            Event("it lasts", pause(1.0)),
        ),
        load=Load(tokens=200),
        errors=BROKEN,
        targets={"gap_s": 2.0},
    ),
    Scenario(
        "gateway ends on SIGTERM",
        "gateway restart",
        (Event("SIGTERM to a gateway under streams", term(some("gateway"), "drain_s"), tokens=20),),
        load=Load(tokens=150, askers=0),
        note="it lets its streams end; short requests of others are not sent to it",
    ),
    Scenario(
        "rolling restart",
        "rolling restart of every process",
        (Event("every process ends on SIGTERM and is replaced", rolling(), tokens=10),),
        load=Load(streams=32, tokens=700, askers=0, patience_s=110),
        targets={"gap_s": 5.0},
    ),
)

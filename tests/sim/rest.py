"""What must be true once nothing happens any more: one leader knows everybody, and nothing is left of any request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.reign import Reign
from tests.sim.checks import Checks, is_settled
from tests.sim.nodes import MODEL, SimGateway, SimScheduler, SimWorker

if TYPE_CHECKING:
    from tests.sim.world import World


def look_at_rest(world: World) -> None:
    """Check the fleet at the end of a run."""
    checks = world.checks
    processes = world.processes.values()
    schedulers = [one for one in processes if isinstance(one, SimScheduler)]
    reigns = [one.process.seat.reign for one in schedulers if one.process is not None]
    leading = [reign for reign in reigns if reign is not None]
    if len(leading) != 1:
        checks.fail("one leader", f"{len(leading)} lead")
        return
    workers = [one for one in processes if isinstance(one, SimWorker)]
    _members(checks, leading[0], workers)
    _nothing_left(checks, leading[0])
    for worker in workers:
        _worker_idle(checks, worker)
    for gateway in processes:
        if isinstance(gateway, SimGateway):
            _gateway_idle(checks, gateway, leading[0].term)


def _members(checks: Checks, reign: Reign, workers: list[SimWorker]) -> None:
    known = {worker.id for worker in reign.core.state.workers.values() if is_settled(worker)}
    alive = {worker.core.worker_id for worker in workers if worker.core is not None}
    if known != alive or len(reign.core.state.workers) != len(alive):
        every = [(one.id, one.registered, one.connected) for one in reign.core.state.workers.values()]
        checks.fail("membership is right", f"leader knows {every}, {sorted(alive)} live")


def _nothing_left(checks: Checks, reign: Reign) -> None:
    state = reign.core.state
    left = {
        "streams of dead gateways": len(state.by_stream) - len(state.gateways),
        "requests": len(state.requests),
        "waiting": len(state.waiting),
        "parked": len(state.parked),
        "claims": len(state.claims),
        "of streams": sum(map(len, state.by_stream.values())),
        "spans": len(reign._spans),
        "running": sum(len(worker.running) for worker in state.workers.values()),
        "unclaimed": sum(len(worker.unclaimed) for worker in state.workers.values()),
        "held": sum(slot.held + slot.promised for worker in state.workers.values() for slot in worker.slots.values()),
        "errors": reign.loop.errors,
    }
    for what, count in left.items():
        if count:
            checks.fail("nothing is left", f"the leader has {count} {what}")
    for worker in state.workers.values():
        for slot in worker.slots.values():
            if slot.free_blocks != slot.total_blocks:
                checks.fail("nothing is left", f"{worker.id}: {slot.free_blocks} of {slot.total_blocks} blocks free")


def _worker_idle(checks: Checks, worker: SimWorker) -> None:
    backend = checks.workers[worker.name].backend
    if worker.core is None or backend is None:
        return
    if not worker.core.idle or backend.busy():
        checks.fail("nothing is left", f"{worker.name} still computes or has unacknowledged output")
    if worker.core._spans._open:
        checks.fail("nothing is left", f"{worker.name} has {len(worker.core._spans._open)} open spans")
    for pool in backend._pools.values():
        if pool.free != pool.total:
            checks.fail("nothing is left", f"{worker.name}: {pool.free} of {pool.total} blocks free")


def _gateway_idle(checks: Checks, gateway: SimGateway, term: int) -> None:
    assert gateway.sessions is not None
    assert gateway.link is not None
    if gateway.sessions.counters()["running"]:
        checks.fail("nothing is left", f"{gateway.name} still runs {gateway.sessions.counters()['running']} streams")
    if not gateway.link.connected or gateway.link.term > term:
        checks.fail("one leader", f"{gateway.name} follows term {gateway.link.term}, the leader has {term}")
    if MODEL not in [model.name for model in gateway.sessions.models()]:
        checks.fail("membership is right", f"{gateway.name} does not offer the model")

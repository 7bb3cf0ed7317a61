"""What `llmos top` shows at one moment, as rows for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmos.cli import output
from llmos.cli.connection import CALL_TIMEOUT_S, Connection, Target, connect
from llmos.cli.drain import order_drain
from llmos.cli.nice import set_priority
from llmos.cli.nodes import node_json
from llmos.cli.ps import request_json
from llmos.v1 import fleet_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_REQUESTS = 200
_BAR = 8

Row = tuple[str, tuple[str, ...]]
"""Key and cells."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of a fleet."""

    load: fleet_pb2.GetLoadResponse
    requests: Sequence[fleet_pb2.RequestInfo]
    """The oldest ones, at most `MAX_REQUESTS`."""

    @property
    def tokens_per_s(self) -> float:
        """Of all models together."""
        return sum(model.tokens_per_s for model in self.load.models)

    @property
    def running(self) -> int:
        """Requests that run."""
        return sum(queue.running for queue in self.load.queues)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(queue.waiting for queue in self.load.queues)

    @property
    def workers(self) -> list[fleet_pb2.Node]:
        """Nodes that compute."""
        return [node for node in self.load.nodes if node.role == fleet_pb2.NODE_ROLE_WORKER]

    def headline(self) -> str:
        """The fleet in one line."""
        up = sum(node.state == fleet_pb2.NODE_STATE_READY for node in self.workers)
        return (
            f"{up}/{len(self.workers)} workers · {self.running} running · {self.waiting} waiting · "
            f"{self.tokens_per_s:,.0f} tokens/s"
        )


class Fleet:
    """A running fleet. `target` is asked each time, as the gateway behind it may change."""

    def __init__(self, target: Callable[[], Target], timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._target = target
        self._timeout_s = timeout_s

    async def look(self) -> Snapshot:
        """Raises LlmosError; CapacityError where it may answer later."""
        async with connect(self._target()) as fleet:
            load = await fleet.fleet.GetLoad(
                fleet_pb2.GetLoadRequest(), metadata=fleet.metadata, timeout=self._timeout_s
            )
            listing = await fleet.fleet.ListRequests(
                fleet_pb2.ListRequestsRequest(limit=MAX_REQUESTS), metadata=fleet.metadata, timeout=self._timeout_s
            )
        return Snapshot(load, list(listing.requests))

    async def kill(self, request_id: str) -> str:
        """End a request; returns what came of it."""
        async with connect(self._target()) as fleet:
            request = fleet_pb2.KillRequestRequest(request_id=request_id)
            answer = await fleet.fleet.KillRequest(request, metadata=fleet.metadata, timeout=self._timeout_s)
        return f"killed {request_id}" if answer.was_running else f"{request_id} had ended already"

    async def nice(self, request_id: str, new: str) -> str:
        """Move a request to another class; returns what came of it."""
        async with connect(self._target()) as fleet:
            before = await set_priority(fleet, request_id, new, self._timeout_s)
        return f"{request_id}: {before} -> {new}"

    async def drain(self, node_id: str, undo: bool) -> str:
        """Empty a worker or take it back; returns what came of it."""
        async with connect(self._target()) as fleet:
            answer = await self._drain(fleet, node_id, undo)
        return f"{node_id} is back in service" if undo else f"{node_id} drains, {answer.running} requests on it"

    async def _drain(self, fleet: Connection, node_id: str, undo: bool) -> fleet_pb2.DrainNodeResponse:
        return await order_drain(fleet, node_id, undo, self._timeout_s)


WORKER_COLUMNS = ("WORKER", "STATE", "KV", "MEMORY", "RUN", "TOK/S", "STEP/S", "DEVICES")
MODEL_COLUMNS = ("MODEL", "REPL", "WAIT", "RUN", "TOK/S", "TTFT 50/95/99 ms", "GAP 50/95/99 ms")
QUEUE_COLUMNS = ("CLASS", "TENANT", "WEIGHT", "WAIT", "TOKENS", "RUN", "TOK/S")
REQUEST_COLUMNS = ("REQUEST", "STATE", "CLASS", "TENANT", "MODEL", "WORKER", "IN", "OUT", "AGE")


def worker_rows(snapshot: Snapshot) -> list[Row]:
    """Workers with their devices and KV memory."""
    loads = {load.node_id: load for load in snapshot.load.workers}
    rows: list[Row] = []
    for node in snapshot.workers:
        load = loads.get(node.id, fleet_pb2.WorkerLoad())
        state = output.enum_name(fleet_pb2.NodeState, node.state)
        numbers = (str(node.running), f"{load.tokens_per_s:,.0f}", f"{load.steps_per_s:,.0f}")
        rows.append((node.id, (node.id, state, kv_bar(node), _memory(node), *numbers, _devices(node))))
    return rows


def model_rows(snapshot: Snapshot) -> list[Row]:
    """Models with their times."""
    return [
        (
            f"{model.name}@{model.version}",
            (
                model.name,
                f"{model.replicas}" if model.replicas == model.wanted else f"{model.replicas}/{model.wanted}",
                str(model.waiting),
                str(model.running),
                f"{model.tokens_per_s:,.0f}",
                _percentiles(model.ttft),
                _percentiles(model.gap),
            ),
        )
        for model in snapshot.load.models
    ]


def queue_rows(snapshot: Snapshot) -> list[Row]:
    """Queues by class and tenant."""
    return [
        (
            f"{queue.priority}/{queue.tenant}",
            (
                output.enum_name(fleet_pb2.PriorityClass, queue.priority),
                queue.tenant,
                str(queue.weight),
                str(queue.waiting),
                f"{queue.waiting_tokens:,}",
                str(queue.running),
                f"{queue.tokens_per_s:,.0f}",
            ),
        )
        for queue in snapshot.load.queues
    ]


def request_rows(snapshot: Snapshot) -> list[Row]:
    """Requests, oldest first."""
    return [
        (
            request.request_id,
            (
                request.request_id,
                output.enum_name(fleet_pb2.RequestState, request.state),
                output.enum_name(fleet_pb2.PriorityClass, request.priority),
                request.tenant,
                request.model,
                request.worker,
                str(request.tokens_in),
                str(request.tokens_out),
                output.seconds_text(request.age_ms / 1000),
            ),
        )
        for request in snapshot.requests
    ]


def kv_bar(node: fleet_pb2.Node) -> str:
    """The taken share of a worker's KV blocks, drawn."""
    total = sum(model.total_blocks for model in node.models)
    if not total:
        return "-"
    taken = max(0, total - sum(model.free_blocks for model in node.models)) / total
    full = round(taken * _BAR)
    return f"{'█' * full}{'░' * (_BAR - full)} {taken:4.0%}"


def _memory(node: fleet_pb2.Node) -> str:
    """Main memory of its processes, and how long it lasts where that can be foretold."""
    for use in node.uses:
        if use.kind == fleet_pb2.RESOURCE_KIND_MEMORY:
            left = f", {output.seconds_text(use.left_s)} left" if use.left_s else ""
            return f"{output.bytes_text(use.used)}/{output.bytes_text(use.limit)}{left}"
    return "-"


def snapshot_json(snapshot: Snapshot) -> dict[str, object]:
    """A snapshot for programs: exactly these keys."""
    load = snapshot.load
    return {
        "term": load.term,
        "nodes": [node_json(node) for node in load.nodes],
        "workers": [
            {
                "id": worker.node_id,
                "running": worker.running,
                "tokens_per_s": round(worker.tokens_per_s, 2),
                "steps_per_s": round(worker.steps_per_s, 2),
            }
            for worker in load.workers
        ],
        "models": [_model_json(model) for model in load.models],
        "queues": [
            {
                "class": output.enum_name(fleet_pb2.PriorityClass, queue.priority),
                "tenant": queue.tenant,
                "weight": queue.weight,
                "waiting": queue.waiting,
                "waiting_tokens": queue.waiting_tokens,
                "running": queue.running,
                "tokens_per_s": round(queue.tokens_per_s, 2),
            }
            for queue in load.queues
        ],
        "requests": [request_json(request) for request in snapshot.requests],
        "counters": dict(sorted(load.counters.items())),
    }


def _model_json(model: fleet_pb2.ModelLoad) -> dict[str, object]:
    def times(found: fleet_pb2.Percentiles) -> dict[str, float]:
        return {"p50": round(found.p50_ms, 3), "p95": round(found.p95_ms, 3), "p99": round(found.p99_ms, 3)}

    return {
        "name": model.name,
        "version": model.version,
        "replicas": model.replicas,
        "wanted": model.wanted,
        "waiting": model.waiting,
        "running": model.running,
        "tokens_per_s": round(model.tokens_per_s, 2),
        "ttft_ms": times(model.ttft),
        "gap_ms": times(model.gap),
    }


def _percentiles(found: fleet_pb2.Percentiles) -> str:
    numbers = (found.p50_ms, found.p95_ms, found.p99_ms)
    return "/".join(f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}" for ms in numbers) if any(numbers) else "-"


def _devices(node: fleet_pb2.Node) -> str:
    parts = [f"{device.name or device.id} {output.bytes_text(device.memory_bytes)}" for device in node.capacity.devices]
    return ", ".join(parts)

"""`llmos ps`: requests that wait or run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from llmos.cli import output
from llmos.cli.flags import AsJson, DataDir

if TYPE_CHECKING:
    from llmos.cli.connection import Target
    from llmos.v1.fleet_pb2 import RequestInfo

Limit = Annotated[int, typer.Option(min=1, max=100_000, help="Most rows.")]


def ps(data_dir: DataDir = None, as_json: AsJson = False, limit: Limit = 1000) -> None:
    """Show the requests that wait or run, oldest first."""
    from llmos.cli.connection import CALL_TIMEOUT_S, find_target

    found = asyncio.run(list_requests(find_target(data_dir), limit, CALL_TIMEOUT_S))
    rows = [request_json(request) for request in found]
    if as_json:
        output.print_json(rows)
        return
    columns = ["ID", "STATE", "MODEL", "TENANT", "CLASS", "WORKER", "ATTEMPT", "IN", "OUT", "AGE"]
    cells = [[str(value) for key, value in row.items() if key != "age_ms"] for row in rows]
    ages = [output.seconds_text(request.age_ms / 1000) for request in found]
    output.print_table(columns, [[*row, age] for row, age in zip(cells, ages, strict=True)], empty="no requests")


async def list_requests(target: Target, limit: int, timeout_s: float) -> list[RequestInfo]:
    """Requests that wait or run, oldest first."""
    from llmos.cli.connection import connect
    from llmos.v1 import fleet_pb2

    async with connect(target) as fleet:
        request = fleet_pb2.ListRequestsRequest(limit=limit)
        return list((await fleet.fleet.ListRequests(request, metadata=fleet.metadata, timeout=timeout_s)).requests)


def request_json(request: RequestInfo) -> dict[str, object]:
    """A request for programs: exactly these keys."""
    from llmos.v1 import fleet_pb2

    return {
        "id": request.request_id,
        "state": output.enum_name(fleet_pb2.RequestState, request.state),
        "model": request.model,
        "tenant": request.tenant,
        "class": output.enum_name(fleet_pb2.PriorityClass, request.priority),
        "worker": request.worker,
        "attempt": request.attempt,
        "tokens_in": request.tokens_in,
        "tokens_out": request.tokens_out,
        "age_ms": request.age_ms,
    }

"""`llmos drain`: empty a worker, or take it back into service."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from llmos.cli import output
from llmos.cli.completion import worker_ids
from llmos.cli.flags import AsJson, DataDir

if TYPE_CHECKING:
    from llmos.cli.connection import Connection, Target
    from llmos.v1.fleet_pb2 import DrainNodeResponse, Node

_POLL_S = 0.3

Worker = Annotated[
    str, typer.Argument(metavar="NODE", help="Id of the worker (`llmos nodes`).", autocompletion=worker_ids)
]
Undo = Annotated[bool, typer.Option("--undo", help="Take the worker back into service.")]
Wait = Annotated[bool, typer.Option("--wait", help="Return once nothing runs on it any more.")]
Patience = Annotated[float, typer.Option("--timeout", min=0.1, help="Most seconds to wait.")]


def drain(
    node: Worker,
    undo: Undo = False,
    wait: Wait = False,
    timeout_s: Patience = 600.0,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Empty a worker: it takes nothing new, and what runs on it moves on without a lost token.

    Where no other worker has the model, what runs finishes where it is. The worker stays drained until --undo.
    """
    from llmos.cli.connection import find_target

    if undo and wait:
        raise typer.BadParameter("--wait goes with draining, not with --undo")
    left = asyncio.run(_drain(find_target(data_dir), node, undo, timeout_s if wait else 0.0))
    if as_json:
        state = "ready" if undo else "drained" if left == 0 else "draining"
        output.print_json({"id": node, "state": state, "running": left})
        return
    if undo:
        output.write(f"{node} is back in service\n")
    elif left:
        output.write(f"{node} takes nothing new; {_requests(left)} on it will move on or finish\n")
    else:
        output.write(f"{node} is drained: nothing runs on it\n")


async def _drain(target: Target, node_id: str, undo: bool, wait_s: float) -> int:
    """Give the order and, if asked to, wait. Returns the requests that still run there."""
    from llmos.cli.connection import CALL_TIMEOUT_S, connect

    async with connect(target) as fleet:
        running = (await order_drain(fleet, node_id, undo, CALL_TIMEOUT_S)).running
    if not wait_s:
        return running
    steps = output.Steps()
    try:
        return await _await_empty(target, node_id, wait_s, steps)
    finally:
        steps.done()


async def order_drain(fleet: Connection, node_id: str, undo: bool, timeout_s: float) -> DrainNodeResponse:
    """Empty a worker, or take it back."""
    from llmos.v1 import fleet_pb2

    request = fleet_pb2.DrainNodeRequest(node_id=node_id, undo=undo)
    return await fleet.fleet.DrainNode(request, metadata=fleet.metadata, timeout=timeout_s)


async def _await_empty(target: Target, node_id: str, wait_s: float, steps: output.Steps) -> int:
    """Until nothing runs on the worker, or it is gone. A fleet that does not answer for a moment is asked again."""
    from llmos.errors import DeadlineExceeded

    shown = -1
    try:
        async with asyncio.timeout(wait_s):
            while True:
                node = await _look(target, node_id)
                if node is None or node.running == 0:
                    return 0
                if node.running != shown:
                    shown = node.running
                    steps(f"draining {node_id}: {_requests(shown)} left")
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise DeadlineExceeded(
            f"{_requests(max(shown, 0))} still run on {node_id} after {wait_s:g} s; it goes on draining"
        ) from None


async def _look(target: Target, node_id: str) -> Node | None:
    """The node; None if it is gone."""
    from llmos.cli.connection import CALL_TIMEOUT_S, connect
    from llmos.errors import CapacityError
    from llmos.v1 import fleet_pb2

    while True:
        try:
            async with connect(target) as fleet:
                call = fleet.fleet.ListNodes(
                    fleet_pb2.ListNodesRequest(), metadata=fleet.metadata, timeout=CALL_TIMEOUT_S
                )
                return next((node for node in (await call).nodes if node.id == node_id), None)
        except CapacityError:
            await asyncio.sleep(_POLL_S)


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"

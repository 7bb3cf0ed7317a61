"""`llmos nice`: move a request to another class of service."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmos.cli import output
from llmos.cli.completion import request_ids
from llmos.cli.flags import AsJson, DataDir

if TYPE_CHECKING:
    from llmos.cli.connection import Connection, Target

Class = Literal["interactive", "standard", "batch"]
Request = Annotated[str, typer.Argument(help="Id of the request (`llmos ps`).", autocompletion=request_ids)]
NewClass = Annotated[Class, typer.Argument(metavar="CLASS", help="interactive, standard or batch.")]


def nice(request: Request, new: NewClass, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Move a request, waiting or running, to another class of service.

    Your own requests you may move down; moving up, and others' requests, need an operator's key.
    """
    from llmos.cli.connection import CALL_TIMEOUT_S, connect, find_target

    async def ask(target: Target) -> str:
        async with connect(target) as fleet:
            return await set_priority(fleet, request, new, CALL_TIMEOUT_S)

    before = asyncio.run(ask(find_target(data_dir)))
    if as_json:
        output.print_json({"id": request, "before": before, "class": new})
    else:
        output.write(f"{request}: {before} -> {new}\n" if before != new else f"{request} is {new} already\n")


async def set_priority(fleet: Connection, request_id: str, new: str, timeout_s: float) -> str:
    """Ask for the change; returns the class before."""
    from llmos.v1 import fleet_pb2

    priority = fleet_pb2.PriorityClass.Value(f"PRIORITY_CLASS_{new.upper()}")
    call = fleet.fleet.SetRequestPriority(
        fleet_pb2.SetRequestPriorityRequest(request_id=request_id, priority=priority),
        metadata=fleet.metadata,
        timeout=timeout_s,
    )
    return output.enum_name(fleet_pb2.PriorityClass, (await call).before)

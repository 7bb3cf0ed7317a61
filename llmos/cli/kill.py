"""`llmos kill`: cancel a request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from llmos.cli import output
from llmos.cli.completion import request_ids
from llmos.cli.flags import DataDir

if TYPE_CHECKING:
    from llmos.cli.connection import Target

Request = Annotated[str, typer.Argument(help="Id of the request (`llmos ps`).", autocompletion=request_ids)]


def kill(request: Request, data_dir: DataDir = None) -> None:
    """Cancel a request. Its client gets an error that says so."""
    from llmos.cli.connection import find_target
    from llmos.errors import NotFound

    if not asyncio.run(_kill(find_target(data_dir), request)):
        raise NotFound(f"no request {request} waits or runs: `llmos ps` shows those that do")
    output.write(f"killed {request}\n")


async def _kill(target: Target, request_id: str) -> bool:
    from llmos.cli.connection import CALL_TIMEOUT_S, connect
    from llmos.v1 import fleet_pb2

    async with connect(target) as fleet:
        request = fleet_pb2.KillRequestRequest(request_id=request_id)
        return (await fleet.fleet.KillRequest(request, metadata=fleet.metadata, timeout=CALL_TIMEOUT_S)).was_running

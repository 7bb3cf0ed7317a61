"""The supervisor of a detached fleet: `python -m llmos.fleet OPTIONS`, started by `llmos up --detach`."""

from __future__ import annotations

import asyncio
import logging
import sys

from llmos.fleet.detach import decode_options
from llmos.fleet.options import free_memory, share_of, usable_cores
from llmos.fleet.plan import ServicePlan
from llmos.fleet.state import FleetState
from llmos.fleet.supervisor import Supervisor
from llmos.lifetime import run_until_signal

log = logging.getLogger("llmos.fleet")


def main(argv: list[str]) -> int:
    """Supervise until SIGTERM. The exit status is 2 if the fleet could not start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    options = decode_options(argv[1])
    plan = ServicePlan(options, share_of(options.workers, usable_cores(), free_memory()))

    async def on_ready(state: FleetState) -> None:
        log.info("ready: HTTP %s, gRPC %s", state.http_url, state.grpc_address)

    async def serve(stop: asyncio.Event) -> None:
        await Supervisor(options, plan, log.info).run(stop, on_ready)

    return run_until_signal(serve)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

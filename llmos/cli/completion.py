"""What tab completion offers. Silent and quick: a fleet that does not answer in a second offers nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

_TIMEOUT_S = 1.0


def request_ids(incomplete: str) -> list[str]:
    """Ids of requests that wait or run in the fleet started last."""
    return _quietly(_request_ids, incomplete)


def worker_ids(incomplete: str) -> list[str]:
    """Ids of the workers of the fleet started last."""
    return _quietly(_worker_ids, incomplete)


def member_names(incomplete: str) -> list[str]:
    """Names of the processes of the fleet started last."""
    return _quietly(_member_names, incomplete)


def served_models(incomplete: str) -> list[str]:
    """Names of models that the fleet started last serves."""
    return _quietly(_served_models, incomplete)


def stored_models(incomplete: str) -> list[str]:
    """Names in the user's model store."""
    return _quietly(_stored_models, incomplete)


def allocation_names(incomplete: str) -> list[str]:
    """Names of allocations in the fleet started last."""
    return _quietly(_allocation_names, incomplete)


def explainable(incomplete: str) -> list[str]:
    """What `llmos explain` takes: requests, models and allocations."""
    return [name for offer in (request_ids, served_models, allocation_names) for name in offer(incomplete)]


async def _allocation_names() -> list[str]:
    from llmos.cli.allocations import list_allocations
    from llmos.cli.connection import find_target

    return [status.allocation.name for status in await list_allocations(find_target(None), _TIMEOUT_S)]


async def _request_ids() -> list[str]:
    from llmos.cli.connection import find_target
    from llmos.cli.ps import list_requests

    return [request.request_id for request in await list_requests(find_target(None), 100, _TIMEOUT_S)]


async def _worker_ids() -> list[str]:
    from llmos.cli.connection import find_target
    from llmos.cli.nodes import list_nodes
    from llmos.v1 import fleet_pb2

    nodes = await list_nodes(find_target(None), _TIMEOUT_S)
    return [node.id for node in nodes if node.role == fleet_pb2.NODE_ROLE_WORKER]


async def _member_names() -> list[str]:
    from llmos.cli.connection import local_fleet

    state = local_fleet(None)
    return [] if state is None else [member.name for member in state.members]


async def _served_models() -> list[str]:
    from llmos.cli.connection import connect, find_target
    from llmos.cli.prompting import list_models

    async with connect(find_target(None)) as fleet:
        return [model.name for model in await list_models(fleet, _TIMEOUT_S)]


async def _stored_models() -> list[str]:
    from llmos.store import Store

    return [manifest.name for manifest in Store().list() if manifest.name]


def _quietly(names: Callable[[], Coroutine[Any, Any, list[str]]], incomplete: str) -> list[str]:
    try:
        return [name for name in asyncio.run(names()) if name.startswith(incomplete)]
    except Exception:
        # Whatever went wrong, an error message in the middle of a half-typed command line helps nobody.
        return []

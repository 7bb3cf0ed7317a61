"""`llmos nodes`: every process of the fleet."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from llmos.cli import output
from llmos.cli.flags import AsJson, DataDir

if TYPE_CHECKING:
    from llmos.cli.connection import Target
    from llmos.fleet.state import Member
    from llmos.v1.fleet_pb2 import Capacity, Node, NodeModel, ResourceUse


def nodes(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show every scheduler, gateway and worker, and what a supervisor on this machine could not keep running."""
    from llmos.cli.connection import CALL_TIMEOUT_S, find_target, local_fleet

    state = local_fleet(data_dir)
    members = {} if state is None else {member.process.pid: member for member in state.members}
    troubled = [member for member in members.values() if member.status != "running"]
    found = asyncio.run(_nodes_or_none(find_target(data_dir), CALL_TIMEOUT_S, bool(troubled)))
    shown = {node.pid for node in found}
    missing = [member for member in troubled if member.process.pid not in shown]
    if as_json:
        rows = [node_json(node, members.get(node.pid)) for node in found]
        output.print_json([*rows, *map(_member_json, missing)])
        return
    columns = [
        "ID",
        "ROLE",
        "STATE",
        "PID",
        "ADDRESS",
        "BACKEND",
        "MODELS",
        "CAPACITY",
        "RUNNING",
        "RESTARTS",
        "DETAIL",
    ]
    cells = [_row(node, members.get(node.pid)) for node in found]
    output.print_table(columns, [*cells, *map(_member_row, missing)], empty="no nodes")


async def _nodes_or_none(target: Target, timeout_s: float, forgiving: bool) -> list[Node]:
    """Every process of the fleet; none if no gateway answers and there is something else to show."""
    from llmos.errors import Unavailable

    try:
        return await list_nodes(target, timeout_s)
    except Unavailable as error:
        if not forgiving:
            raise
        output.error(error.message)
        return []


async def list_nodes(target: Target, timeout_s: float) -> list[Node]:
    """Every process of the fleet."""
    from llmos.cli.connection import connect
    from llmos.v1 import fleet_pb2

    async with connect(target) as fleet:
        call = fleet.fleet.ListNodes(fleet_pb2.ListNodesRequest(), metadata=fleet.metadata, timeout=timeout_s)
        return list((await call).nodes)


def node_json(node: Node, member: Member | None = None) -> dict[str, object]:
    """A node for programs: exactly these keys, whatever its role. `member`: it, as its supervisor sees it."""
    from llmos.v1 import fleet_pb2

    return {
        "id": node.id,
        "role": output.enum_name(fleet_pb2.NodeRole, node.role),
        "pid": node.pid,
        "host": node.host,
        "address": node.address,
        "backend": node.backend,
        "models": [_model_json(model) for model in node.models],
        "state": output.enum_name(fleet_pb2.NodeState, node.state),
        "capacity": _capacity_json(node.capacity) if node.HasField("capacity") else None,
        "restarts": None if member is None else member.restarts,
        "detail": _detail(node, member),
        "uses": [_use_json(use) for use in node.uses],
    }


def _use_json(use: ResourceUse) -> dict[str, object]:
    from llmos.v1 import fleet_pb2

    return {
        "kind": output.enum_name(fleet_pb2.ResourceKind, use.kind),
        "device": use.device_id,
        "used": use.used,
        "limit": use.limit,
        "growth_per_s": round(use.growth_per_s, 3),
        "growth_per_request": round(use.growth_per_request, 3),
        "left_s": round(use.left_s, 1),
    }


def _detail(node: Node, member: Member | None) -> str:
    """Why it takes nothing new; else why it was started again last."""
    from llmos.v1 import fleet_pb2

    if node.drain_reason:
        reason = output.enum_name(fleet_pb2.DrainReason, node.drain_reason)
        return f"{reason}: {node.drain_detail}" if node.drain_detail else reason
    if node.ejection_detail:
        return node.ejection_detail
    return "" if member is None else member.said


def _member_json(member: Member) -> dict[str, object]:
    """A member that is not there, with the keys of a node."""
    return {
        "id": member.id or member.name,
        "role": member.role,
        "pid": member.process.pid,
        "host": "",
        "address": "",
        "backend": "",
        "models": [],
        "state": member.status,
        "capacity": None,
        "restarts": member.restarts,
        "detail": f"{member.name} {member.said}",
        "uses": [],
    }


def _member_row(member: Member) -> list[str]:
    shown = [member.id or member.name, member.role, member.status, str(member.process.pid)]
    return [*shown, "", "", "", "", "", str(member.restarts), f"{member.name} {member.said}"]


def _model_json(model: NodeModel) -> dict[str, object]:
    from llmos.v1 import fleet_pb2

    return {
        "name": model.name,
        "version": model.version,
        "state": output.enum_name(fleet_pb2.ModelState, model.state),
        "total_blocks": model.total_blocks,
        "free_blocks": model.free_blocks,
        "detail": model.detail,
    }


def _capacity_json(capacity: Capacity) -> dict[str, object]:
    from llmos.v1 import fleet_pb2

    return {
        "devices": [
            {
                "id": device.id,
                "kind": output.enum_name(fleet_pb2.DeviceKind, device.kind),
                "name": device.name,
                "memory_bytes": device.memory_bytes,
            }
            for device in capacity.devices
        ],
        "cpu_cores": capacity.cpu_cores,
        "memory_bytes": capacity.memory_bytes,
        "disk_bytes": capacity.disk_bytes,
    }


def _row(node: Node, member: Member | None) -> list[str]:
    from llmos.v1 import fleet_pb2

    return [
        node.id,
        output.enum_name(fleet_pb2.NodeRole, node.role),
        output.enum_name(fleet_pb2.NodeState, node.state),
        str(node.pid),
        node.address,
        node.backend,
        ", ".join(_model_text(model) for model in node.models),
        _capacity_text(node.capacity) if node.HasField("capacity") else "",
        str(node.running),
        "" if member is None else str(member.restarts),
        _detail(node, member),
    ]


def _model_text(model: NodeModel) -> str:
    from llmos.v1 import fleet_pb2

    state = output.enum_name(fleet_pb2.ModelState, model.state)
    return f"{model.name} ({state}{': ' + model.detail if model.detail else ''})"


def _capacity_text(capacity: Capacity) -> str:
    from llmos.v1 import fleet_pb2

    gpus = [device for device in capacity.devices if device.kind == fleet_pb2.DEVICE_KIND_GPU]
    parts = [f"{device.name} {output.bytes_text(device.memory_bytes)}" for device in gpus]
    return ", ".join([*parts, f"{capacity.cpu_cores:g} cores", output.bytes_text(capacity.memory_bytes)])

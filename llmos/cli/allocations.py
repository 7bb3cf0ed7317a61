"""`llmos allocations`: what is promised to models and jobs, and what of it stands."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmos.cli import output
from llmos.cli.completion import allocation_names, served_models
from llmos.cli.flags import AsJson, DataDir

if TYPE_CHECKING:
    from llmos.cli.connection import Target
    from llmos.v1.fleet_pb2 import Allocation, AllocationStatus, ReservedShare

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="Name of the allocation.", autocompletion=allocation_names)]
Class = Literal["guaranteed", "burstable", "best-effort"]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Promise replicas of this model.", autocompletion=served_models)
]
Least = Annotated[
    int, typer.Option("--min", min=0, max=10_000, help="Fewest replicas; 0: unloaded when idle, back on request.")
]
Most = Annotated[int, typer.Option("--max", min=0, max=10_000, help="Most replicas; 0: as many as there is room for.")]
Pins = Annotated[
    list[str] | None, typer.Option("--pin", help="A worker that must have it, by id or host; may be repeated.")
]
Reserve = Annotated[
    list[str] | None,
    typer.Option(
        "--reserve",
        metavar="HOLDER=PERCENT",
        help="Share of its KV blocks for tenant:NAME or class:NAME; may be repeated.",
    ),
]
TargetRequests = Annotated[
    int, typer.Option("--target", min=0, max=100_000, help="Requests that a replica is meant to run; 0: 16.")
]
IsJob = Annotated[bool, typer.Option("--job", help="Promise resources of one worker to a job instead.")]
Memory = Annotated[str, typer.Option("--memory", metavar="SIZE", help="Job: device memory, such as 4GiB.")]
Cores = Annotated[float, typer.Option("--cpu", min=0, help="Job: processors.")]
Disk = Annotated[str, typer.Option("--disk", metavar="SIZE", help="Job: disk, such as 10GiB.")]
Kind = Annotated[Class, typer.Option("--class", help="guaranteed is never taken away, best-effort gives way at once.")]
Pool = Annotated[str, typer.Option("--pool", help="Pool of workers; by default the default one.")]
Revision = Annotated[int, typer.Option("--revision", min=0, help="Change it only if this is still its revision.")]
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]i?B|B)?")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_CLASSES = ("interactive", "standard", "batch")


@app.command("ls")
def ls(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show every allocation, what stands of it, and why not all does."""
    from llmos.cli.connection import CALL_TIMEOUT_S, find_target

    found = asyncio.run(list_allocations(find_target(data_dir), CALL_TIMEOUT_S))
    if as_json:
        output.print_json([status_json(status) for status in found])
        return
    columns = ["NAME", "HOLDER", "CLASS", "POOL", "PROMISED", "STANDS", "WORKERS", "PROBLEM"]
    output.print_table(
        columns, [_row(status) for status in found], empty="no allocations: workers load what fits; `set` makes one"
    )


@app.command("set")
def set_(
    name: Name,
    model: Model = "",
    least: Least = 0,
    most: Most = 0,
    pin: Pins = None,
    reserve: Reserve = None,
    target: TargetRequests = 0,
    job: IsJob = False,
    memory: Memory = "",
    cpu: Cores = 0.0,
    disk: Disk = "",
    kind: Kind = "burstable",
    pool: Pool = "",
    revision: Revision = 0,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make or change an allocation: replicas of a model, or what a job takes. Refused if it could never be kept."""
    from llmos.cli.connection import find_target
    from llmos.errors import ConfigError
    from llmos.v1 import fleet_pb2

    if job == bool(model):
        raise ConfigError("give either --model NAME or --job")
    wanted = fleet_pb2.Allocation(name=name, pool=pool, revision=revision, resource_class=_resource_class(kind))
    if job:
        wanted.job.memory_bytes, wanted.job.cpu_cores, wanted.job.disk_bytes = _size(memory), cpu, _size(disk)
        wanted.job.SetInParent()
    else:
        spec = wanted.model
        spec.model, spec.min_replicas, spec.max_replicas, spec.target_requests = model, least, most, target
        spec.pinned_workers.extend(pin or ())
        spec.reserved.extend(map(_share, reserve or ()))
    written = asyncio.run(_set(find_target(data_dir), wanted))
    if as_json:
        output.print_json(allocation_json(written))
        return
    output.write(f"promised {name} (revision {written.revision}); `llmos allocations ls` shows what stands\n")


@app.command("rm")
def rm(name: Name, data_dir: DataDir = None) -> None:
    """Take an allocation back; what only it held is freed."""
    from llmos.cli.connection import find_target
    from llmos.errors import NotFound

    if not asyncio.run(_delete(find_target(data_dir), name)):
        raise NotFound(f"there is no allocation {name}: `llmos allocations ls` shows those there are")
    output.write(f"took back {name}\n")


async def list_allocations(target: Target, timeout_s: float) -> list[AllocationStatus]:
    """All of them, by name."""
    from llmos.cli.connection import connect
    from llmos.v1 import fleet_pb2

    async with connect(target) as fleet:
        request = fleet_pb2.ListAllocationsRequest()
        answer = await fleet.fleet.ListAllocations(request, metadata=fleet.metadata, timeout=timeout_s)
        return list(answer.allocations)


async def _set(target: Target, wanted: Allocation) -> Allocation:
    from llmos.cli.connection import CALL_TIMEOUT_S, connect
    from llmos.v1 import fleet_pb2

    async with connect(target) as fleet:
        request = fleet_pb2.SetAllocationRequest(allocation=wanted)
        answer = await fleet.fleet.SetAllocation(request, metadata=fleet.metadata, timeout=CALL_TIMEOUT_S)
        return answer.allocation


async def _delete(target: Target, name: str) -> bool:
    from llmos.cli.connection import CALL_TIMEOUT_S, connect
    from llmos.v1 import fleet_pb2

    async with connect(target) as fleet:
        request = fleet_pb2.DeleteAllocationRequest(name=name)
        answer = await fleet.fleet.DeleteAllocation(request, metadata=fleet.metadata, timeout=CALL_TIMEOUT_S)
        return answer.was_there


def status_json(status: AllocationStatus) -> dict[str, object]:
    """An allocation and what stands of it, for programs."""
    return {
        **allocation_json(status.allocation),
        "workers": list(status.workers),
        "wanted": status.wanted,
        "problem": status.problem,
    }


def allocation_json(allocation: Allocation) -> dict[str, object]:
    """An allocation for programs: exactly these keys; either `model` or `job` is null."""
    from llmos.v1 import fleet_pb2

    spec, job = allocation.model, allocation.job
    shares = [
        {
            "tenant": share.tenant,
            "class": output.enum_name(fleet_pb2.PriorityClass, share.priority) if share.priority else "",
            "percent": share.percent,
        }
        for share in spec.reserved
    ]
    return {
        "name": allocation.name,
        "class": _class_name(allocation),
        "pool": allocation.pool,
        "revision": allocation.revision,
        "model": None
        if not allocation.HasField("model")
        else {
            "name": spec.model,
            "min": spec.min_replicas,
            "max": spec.max_replicas,
            "pinned": list(spec.pinned_workers),
            "reserved": shares,
            "target": spec.target_requests,
        },
        "job": None
        if not allocation.HasField("job")
        else {"memory_bytes": job.memory_bytes, "cpu_cores": job.cpu_cores, "disk_bytes": job.disk_bytes},
    }


def _row(status: AllocationStatus) -> list[str]:
    allocation, spec, job = status.allocation, status.allocation.model, status.allocation.job
    if allocation.HasField("job"):
        holder, promised = "job", f"{output.bytes_text(job.memory_bytes)}, {job.cpu_cores:g} cores"
    else:
        holder = f"model {spec.model}"
        promised = f"{spec.min_replicas} to {spec.max_replicas or 'any'}"
        promised += f" on {', '.join(spec.pinned_workers)}" if spec.pinned_workers else ""
    stands = f"{len(status.workers)} of {status.wanted}"
    workers = ", ".join(status.workers)
    return [
        allocation.name,
        holder,
        _class_name(allocation),
        allocation.pool,
        promised,
        stands,
        workers,
        status.problem,
    ]


def _class_name(allocation: Allocation) -> str:
    from llmos.v1 import fleet_pb2

    kind = allocation.resource_class or fleet_pb2.RESOURCE_CLASS_BURSTABLE
    return output.enum_name(fleet_pb2.ResourceClass, kind).replace("_", "-")


def _resource_class(kind: Class) -> Any:
    from llmos.v1 import fleet_pb2

    return fleet_pb2.ResourceClass.Value(f"RESOURCE_CLASS_{kind.upper().replace('-', '_')}")


def _share(text: str) -> ReservedShare:
    from llmos.errors import ConfigError
    from llmos.v1 import fleet_pb2

    holder, _, percent = text.rpartition("=")
    kind, _, who = holder.partition(":")
    number = percent.removesuffix("%")
    known = bool(who) and (kind == "tenant" or (kind == "class" and who in _CLASSES))
    if not known or not number.isdecimal() or not 1 <= int(number[:4]) <= 100:
        raise ConfigError(f"'{text}' is no share: write tenant:NAME=30 or class:interactive=30")
    if kind == "tenant":
        return fleet_pb2.ReservedShare(tenant=who, percent=int(number))
    return fleet_pb2.ReservedShare(
        priority=fleet_pb2.PriorityClass.Value(f"PRIORITY_CLASS_{who.upper()}"), percent=int(number)
    )


def _size(text: str) -> int:
    from llmos.errors import ConfigError

    if not text:
        return 0
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[match[2] or "B"]) if match is not None else 2**61
    if size > 2**60:
        raise ConfigError(f"'{text}' is not a size: write it as 4GiB or 24GB")
    return size

"""Which fleet a command talks to, and the connection to its gateway. Slow to import: commands do so when they run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc

from llmos.config import TlsConfig, environment
from llmos.errors import ConfigError, Unavailable
from llmos.fleet.identity import is_alive
from llmos.fleet.options import HOST
from llmos.fleet.shutdown import is_running
from llmos.fleet.state import FleetState, last_up, read_state, state_home
from llmos.rpc import CODE_KEY, error_from_rpc, open_channel
from llmos.v1 import fleet_pb2_grpc, inference_pb2_grpc

CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where a fleet can be reached."""

    address: str
    """host:port of a gateway's public gRPC API."""
    api_key: str = ""
    tls: TlsConfig = field(default_factory=TlsConfig)


@dataclass(frozen=True, slots=True)
class Connection:
    """Stubs of one gateway. `metadata` goes with every call."""

    inference: inference_pb2_grpc.InferenceAsyncStub
    fleet: fleet_pb2_grpc.FleetAsyncStub
    metadata: tuple[tuple[str, str], ...]


def find_target(data_dir: Path | None, environ: Mapping[str, str] | None = None) -> Target:
    """The fleet of `data_dir`, else LLMOS_ADDRESS, else the last `up`. Raises Unavailable or ConfigError."""
    environ = environment() if environ is None else environ
    key = environ.get("LLMOS_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("LLMOS_API_KEY holds characters that no key has: set it to one line of `llmos keys add`")
    ca_file = environ.get("LLMOS_CA_FILE", "")
    address = environ.get("LLMOS_ADDRESS", "")
    if data_dir is None and address:
        if not address.rpartition(":")[2].isdecimal():
            raise ConfigError(f"LLMOS_ADDRESS must be host:port of a gateway's gRPC API, not '{address}'")
        return Target(address, key, TlsConfig(ca_file=Path(ca_file)) if ca_file else TlsConfig())
    return Target(_local_address(data_dir, environ), key)


def local_fleet(data_dir: Path | None, environ: Mapping[str, str] | None = None) -> FleetState | None:
    """The fleet that `find_target` means, as its supervisor sees it; None if it was not started on this machine."""
    environ = environment() if environ is None else environ
    if data_dir is None and environ.get("LLMOS_ADDRESS", ""):
        return None
    folder = data_dir or last_up(state_home(environ))
    state = read_state(folder) if folder is not None else None
    return state if state is not None and is_running(state) else None


def _local_address(data_dir: Path | None, environ: Mapping[str, str]) -> str:
    folder = data_dir or last_up(state_home(environ))
    state = read_state(folder) if folder is not None else None
    if state is None or not is_running(state) or state.phase == "failed":
        where = f" in {data_dir}" if data_dir else ""
        hint = f" --data-dir {data_dir}" if data_dir else ""
        raise Unavailable(f"no fleet is running{where}: start one with `llmos up{hint}`")
    if not state.grpc_address:
        raise Unavailable(f"the fleet is not ready yet ({state.step or state.phase}): try again in a moment")
    return _live_gateway(state)


def _live_gateway(state: FleetState) -> str:
    """Address of the first gateway that lives: any of them answers for the whole fleet."""
    for member in state.members:
        if member.role == "gateway" and "grpc_port" in member.ports and is_alive(member.process):
            return f"{HOST}:{member.ports['grpc_port']}"
    return state.grpc_address


@asynccontextmanager
async def connect(target: Target) -> AsyncIterator[Connection]:
    """A connection for the block; failed calls inside become typed errors."""
    metadata = (("authorization", f"Bearer {target.api_key}"),) if target.api_key else ()
    channel = open_channel(target.address, target.tls)
    try:
        # One stub class serves both kinds of channels; its asynchronous face exists for the type checker only.
        inference = cast("inference_pb2_grpc.InferenceAsyncStub", inference_pb2_grpc.InferenceStub(channel))
        fleet = cast("fleet_pb2_grpc.FleetAsyncStub", fleet_pb2_grpc.FleetStub(channel))
        yield Connection(inference, fleet, metadata)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE and not _is_typed(error):
            raise Unavailable(
                f"no gateway answers at {target.address}: see that the fleet runs and the address is right"
            ) from error
        raise error_from_rpc(error) from error
    finally:
        await channel.close()


def _is_typed(error: grpc.aio.AioRpcError) -> bool:
    return any(key == CODE_KEY for key, _ in error.trailing_metadata() or ())

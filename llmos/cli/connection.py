"""Which fleet a command talks to, and the connection to its gateway. Slow to import: commands do so when they run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc

from llmos.config import TlsConfig, environment
from llmos.errors import ConfigError, Unavailable
from llmos.fleet.identity import is_alive
from llmos.fleet.options import HOST
from llmos.fleet.probe import accepts
from llmos.fleet.shutdown import is_running
from llmos.fleet.state import FleetState, last_up, read_state, state_home
from llmos.rpc import CODE_KEY, error_from_rpc, open_channel
from llmos.v1 import fleet_pb2_grpc, inference_pb2_grpc

CALL_TIMEOUT_S = 10.0
_KNOCK_S = 1.0


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


def find_target(data_dir: Path | None, environ: Mapping[str, str] | None = None, *, avoid: str = "") -> Target:
    """The fleet of `data_dir`, else LLMOS_ADDRESS, else the last `up`: a gateway that answers there, another one than
    `avoid` if there is any. Raises Unavailable or ConfigError."""
    environ = environment() if environ is None else environ
    key = environ.get("LLMOS_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("LLMOS_API_KEY holds characters that no key has: set it to one line of `llmos keys add`")
    ca_file = environ.get("LLMOS_CA_FILE", "")
    given = environ.get("LLMOS_ADDRESS", "")
    if data_dir is None and given:
        address = _answering(_addresses(given), avoid)
        return Target(address, key, TlsConfig(ca_file=Path(ca_file)) if ca_file else TlsConfig())
    return Target(_local_address(data_dir, environ, avoid), key)


def local_fleet(data_dir: Path | None, environ: Mapping[str, str] | None = None) -> FleetState | None:
    """The fleet that `find_target` means, as its supervisor sees it; None if it was not started on this machine."""
    environ = environment() if environ is None else environ
    if data_dir is None and environ.get("LLMOS_ADDRESS", ""):
        return None
    folder = data_dir or last_up(state_home(environ))
    state = read_state(folder) if folder is not None else None
    return state if state is not None and is_running(state) else None


def _addresses(given: str) -> list[str]:
    found = [address.strip() for address in given.split(",") if address.strip()]
    for address in found:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"LLMOS_ADDRESS must be host:port of gateways' gRPC API, not '{address}'")
    if not found:
        raise ConfigError("LLMOS_ADDRESS names no host:port")
    return found


def _answering(addresses: Sequence[str], avoid: str) -> str:
    """The first that takes connections, `avoid` last; a single one is not asked."""
    if len(addresses) == 1:
        return addresses[0]
    order = sorted(addresses, key=lambda address: address == avoid)
    return next((address for address in order if accepts(address, _KNOCK_S)), order[0])


def _local_address(data_dir: Path | None, environ: Mapping[str, str], avoid: str) -> str:
    folder = data_dir or last_up(state_home(environ))
    state = read_state(folder) if folder is not None else None
    if state is None or not is_running(state) or state.phase == "failed":
        where = f" in {data_dir}" if data_dir else ""
        hint = f" --data-dir {data_dir}" if data_dir else ""
        raise Unavailable(f"no fleet is running{where}: start one with `llmos up{hint}`")
    if not state.grpc_address:
        raise Unavailable(f"the fleet is not ready yet ({state.step or state.phase}): try again in a moment")
    return _live_gateway(state, avoid)


def _live_gateway(state: FleetState, avoid: str) -> str:
    """Address of the first gateway that lives, `avoid` last: any of them answers for the whole fleet."""
    gateways = [member for member in state.members if member.role == "gateway" and "grpc_port" in member.ports]
    live = [f"{HOST}:{member.ports['grpc_port']}" for member in gateways if is_alive(member.process)]
    return min(live, key=lambda address: address == avoid, default=state.grpc_address)


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

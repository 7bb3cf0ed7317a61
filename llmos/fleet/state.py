"""The state file `<data-dir>/fleet.json`, and the pointer to the fleet that was started last.

Written by the supervisor alone, always as a whole; read by every command. It names processes by identity, so that a
stale file can never direct a signal at a stranger.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from llmos.fleet.identity import ProcessIdentity

STATE_FILE = "fleet.json"
LAST_UP = "last-up"

Role = Literal["etcd", "scheduler", "worker", "gateway"]
MemberStatus = Literal["starting", "running", "draining", "waiting", "failed"]
"""`waiting`: it ended and is started again soon; `failed`: it ended too often and is given up."""
Phase = Literal["starting", "ready", "stopping", "failed"]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the fleet."""

    name: str
    role: Role
    process: ProcessIdentity
    log: str
    id: str = ""
    ports: dict[str, int] = {}
    """Ports from its ready file, by name; empty until it serves."""
    status: MemberStatus = "running"
    restarts: int = 0
    """Starts after the first one."""
    said: str = ""
    """Why it is not running, or was started again last."""


class Restart(msgspec.Struct, frozen=True, kw_only=True):
    """An ordered restart of members, one after another, as far as it has come."""

    id: str
    """Of the order."""
    total: int
    done: int = 0
    member: str = ""
    """The one whose turn it is."""
    error: str = ""
    """Why it went no further."""
    over: bool = False


class FleetState(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet as its supervisor sees it."""

    phase: Phase
    supervisor: ProcessIdentity
    step: str = ""
    """What is going on while it starts, for people."""
    error: str = ""
    """Why it failed."""
    members: tuple[Member, ...] = ()
    http_url: str = ""
    """Base of the first gateway's HTTP API."""
    grpc_address: str = ""
    """host:port of the first gateway's public gRPC API."""
    etcd_endpoints: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    restart: Restart | None = None
    """The last ordered restart."""


def state_home(environ: Mapping[str, str]) -> Path:
    """The user's folder for llmos' state: `$XDG_STATE_HOME/llmos`, by default `~/.local/state/llmos`."""
    base = environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base else Path.home() / ".local" / "state") / "llmos"


def read_state(data_dir: Path) -> FleetState | None:
    """The state file; None if there is none or an incompatible release wrote it."""
    try:
        return msgspec.json.decode((data_dir / STATE_FILE).read_bytes(), type=FleetState)
    except (OSError, msgspec.MsgspecError):
        return None


def write_state(data_dir: Path, state: FleetState) -> None:
    """Replace the state file at once: a reader sees the old or the new one."""
    replace_file(data_dir / STATE_FILE, msgspec.json.format(msgspec.json.encode(state), indent=2))


def remove_state(data_dir: Path) -> None:
    """Forget the fleet; nothing happens if there is no state file."""
    (data_dir / STATE_FILE).unlink(missing_ok=True)


def remember_last_up(home: Path, data_dir: Path) -> None:
    """Make this the fleet that commands talk to when they are not told which."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(home / LAST_UP, f"{data_dir.absolute()}\n".encode())


def last_up(home: Path) -> Path | None:
    """Data folder of the fleet started last; None if there was none."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = (home / LAST_UP).read_text(encoding="utf-8").strip()
        return Path(text) if text else None
    return None


def replace_file(path: Path, content: bytes) -> None:
    """Write a file at once as a whole: a reader sees the old or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

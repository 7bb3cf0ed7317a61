"""The embedded etcd: find the program, choose ports, give it a clean membership."""

from __future__ import annotations

import random
import shutil
import socket
import sys
from pathlib import Path

from llmos.clock import SystemClock
from llmos.errors import MissingExtra
from llmos.etcd import EtcdClient, EtcdConfig
from llmos.fleet.options import HOST

NAME = "etcd"
_MEMBERSHIP = ("/llmos/v1/workers/", "/llmos/v1/schedulers/", "/llmos/v1/leader")


def find_etcd(search_path: str | None = None) -> str:
    """The etcd program: beside the interpreter, else on `search_path` (None: PATH). Raises MissingExtra."""
    beside = Path(sys.executable).parent / NAME
    found = str(beside) if beside.is_file() else shutil.which(NAME, path=search_path)
    if found is None:
        raise MissingExtra("embedded", "An embedded fleet runs its own etcd, which")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now. Somebody else may take one before its use: the caller tries again."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    try:
        return [int(server.getsockname()[1]) for server in sockets]
    finally:
        for server in sockets:
            server.close()


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` now."""
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        return False
    return True


def etcd_command(program: str, data_dir: Path, client_port: int, peer_port: int) -> list[str]:
    """Program and arguments of a single-member etcd on loopback that syncs every write to disk."""
    client, peer = f"http://{HOST}:{client_port}", f"http://{HOST}:{peer_port}"
    return [
        program,
        *("--name", "llmos", "--data-dir", str(data_dir)),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"llmos={peer}"),
        *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "10m", "--log-level", "warn"),
    ]


async def forget_members(endpoint: str) -> None:
    """Delete the membership of this data folder's last fleet.

    The embedded etcd has no other users and the folder's lock says that all its former members are dead; without this,
    a start after a crash would wait for the lease of the dead leader.
    """
    config = EtcdConfig(endpoints=(endpoint,))
    async with EtcdClient(config, clock=SystemClock(), rng=random.SystemRandom()) as client:
        for prefix in _MEMBERSHIP:
            await client.delete_prefix(prefix)

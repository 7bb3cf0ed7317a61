"""What `llmos up` was asked for, and what of this machine each worker gets."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from llmos import cgroups
from llmos.errors import ConfigError
from llmos.store.precision import Precision

HOST = "127.0.0.1"
DEFAULT_HTTP_PORT = 8000
DEFAULT_GRPC_PORT = 8001
_MEMORY_SHARE = 0.9
_MOST_PROCESSES = 64
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """An embedded fleet on loopback."""

    data_dir: Path
    """Folder of etcd's data, logs, ready files and the state file."""
    workers: int = 1
    """Number of workers; they share the machine's cores and memory evenly."""
    schedulers: int = 1
    """Number of schedulers; one leads, the others stand by."""
    gateways: int = 1
    """Number of gateways; the first gets `http_port` and `grpc_port`, the others free ones."""
    backend: Literal["torch", "echo"] = "torch"
    """What computes: `torch` runs real models, `echo` makes up tokens."""
    precision: Precision = "auto"
    """Of the torch backend: each model's own plan, or one precision for all."""
    device: str = "auto"
    """Where the torch backend computes: `cpu`, `cuda` or `cuda:N`; `auto`: on graphics processors where it can."""
    model: str = ""
    """What the workers serve, comma-separated: names in the model store, or for echo `NAME` or `NAME=40GiB`."""
    store: Path | None = None
    """Folder of the model store; None: the user's."""
    http_port: int | None = None
    """Port of the HTTP API; None: 8000, or a free one if that is taken."""
    grpc_port: int | None = None
    """Port of the public gRPC API; None: 8001, or a free one if that is taken."""
    etcd: tuple[str, ...] = ()
    """host:port of an existing etcd cluster; empty: start one."""
    keys_file: Path | None = None
    """API keys; None: any key is accepted."""
    echo_tokens_per_second: float | None = None
    """Speed of the echo backend; None: the worker's default."""
    start_timeout_s: float = 300.0
    """How long the fleet may take until it is ready."""

    def __post_init__(self) -> None:
        for name in ("workers", "schedulers", "gateways"):
            if not 1 <= getattr(self, name) <= _MOST_PROCESSES:
                raise ConfigError(f"--{name} must be between 1 and {_MOST_PROCESSES}", param=name)
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"--device is auto, cpu, cuda or cuda:N, not '{self.device}'", param="device")
        for name in ("http_port", "grpc_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65_535:
                raise ConfigError(f"--{name.replace('_', '-')} must be between 0 and 65535", param=name)

    @property
    def log_dir(self) -> Path:
        """Where every process logs, in `<name>.log`."""
        return self.data_dir / "logs"

    @property
    def ready_dir(self) -> Path:
        """Where every service says, in `<name>.json`, that it serves and on which ports."""
        return self.data_dir / "ready"

    @property
    def stream_key_file(self) -> Path:
        """The gateways' common key; it outlives the fleet."""
        return self.data_dir / "streams.key"


def make_folders(options: FleetOptions) -> None:
    """Make the data folder, for its owner alone, and what is in it: folders, and the gateways' key. Raises
    ConfigError."""
    try:
        for folder in (options.data_dir, options.log_dir, options.ready_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not options.stream_key_file.exists():
            options.stream_key_file.touch(mode=0o600)
            options.stream_key_file.write_text(f"{secrets.token_hex(32)}\n", encoding="ascii")
    except OSError as error:
        raise ConfigError(
            f"cannot use {options.data_dir} as data folder: {error.strerror}", param="data_dir"
        ) from error


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker may use."""

    threads: int
    memory_bytes: int


def share_of(workers: int, cores: int, free_bytes: int) -> Share:
    """An even split that leaves a tenth of the free memory to everybody else."""
    return Share(max(1, cores // workers), int(free_bytes * _MEMORY_SHARE) // workers)


def usable_cores() -> int:
    """Processors that this process can keep busy, within the quota of its control groups; at least 1."""
    return cgroups.whole_cores(cgroups.read())


def free_memory() -> int:
    """Bytes of main memory free now, within the limit of this process's control groups."""
    free = int(psutil.virtual_memory().available)
    return min(free, cgroups.read().memory_bytes or free)

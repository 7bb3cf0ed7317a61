"""A worker: holds models, computes what the scheduler sends, reports what it has."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmos.addresses import is_loopback, is_wildcard
from llmos.config import TlsConfig
from llmos.errors import ConfigError
from llmos.etcd import EtcdConfig
from llmos.store.precision import Precision


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Everything that can be set for one worker process."""

    id: str = ""
    """Name of this worker, unique per process start; empty: made up."""
    host: str = "127.0.0.1"
    """Address to listen on, and the one that schedulers are told. Other than loopback needs TLS."""
    port: int = 0
    """Port to listen on; 0: a free one."""
    advertise: str = ""
    """host:port that schedulers are told, if a proxy or port mapping stands before this worker; empty: its own."""
    ready_file: Path | None = None
    """File to write once it serves: JSON with id, pid and port."""
    backend: Literal["echo", "torch"] = "torch"
    """What computes: `torch` runs real models, `echo` makes up tokens."""
    device: str = "auto"
    """Where the torch backend computes: `cpu`, `cuda` or `cuda:N`; `auto`: a graphics processor if torch can use one,
    else the CPU. A worker computes on one: start one worker for each, and say so with `place`."""
    place: str = "1/1"
    """Which of this machine's workers it is: `2/4` is the second of four. They are dealt out to the graphics processors
    in turn, and share those that several have."""
    precision: Precision = "auto"
    """Of the torch backend: `auto` serves each model as its plan says where the kernels can, else in fp32; on CUDA that
    is bf16. `fp32`, `fp16` and `int8` serve every model in that; on CUDA `int8` is bf16 too."""
    model: tuple[str, ...] = ()
    """Models that it can load: names in the model store; for echo NAME, or NAME=40GiB to declare its weights."""
    store: Path | None = None
    """Folder of the model store; unset: the user's."""
    threads: int = 0
    """Threads that compute; 0: one per processor that may be used, within the quota of its control groups."""
    memory_limit: int = 0
    """Bytes of main memory that it may use; 0: what the host and its control groups allow."""
    probe_recording: Path | None = None
    """Recorded totals to report instead of measured ones (`python -m worker.probe --record FILE`)."""
    gpu_use_recording: Path | None = None
    """Recorded use of graphics processors' memory to report instead of measuring it (`python -m worker.gpu_use`)."""
    pool: str = ""
    """Placement pool that it belongs to; empty: the default one."""
    echo_tokens_per_second: float = 0.0
    """Speed of one echo stream; 0: as fast as possible."""
    echo_load_s: float = 0.0
    """Seconds that loading an echo model takes."""
    echo_leak_bytes: int = 0
    """Bytes of memory that each step of the echo engine loses for good, to test what becomes of a worker that leaks."""
    lease_ttl_s: float = 5.0
    """Seconds after which its record vanishes from etcd once it no longer renews it."""
    drain_s: float = 10.0
    """Seconds that running attempts get to finish after SIGTERM."""
    spare_engine: bool = True
    """Keep a second engine process, started and empty, so that a lost one is replaced at once. It takes about 0.3 GB of
    main memory. Of the torch backend only; echo starts at once."""
    orphan_s: float = 10.0
    """Seconds without a scheduler after which running attempts are cancelled."""
    etcd_endpoints: tuple[str, ...] = ("127.0.0.1:2379",)
    """host:port of etcd's members; empty: do not register."""
    etcd_user: str = ""
    """User for etcd; empty: none."""
    etcd_password: str = field(default="", repr=False)
    """Password for etcd; better given in the environment than as a flag."""
    etcd_ca_file: Path | None = None
    """PEM file of the authority that signed etcd's certificates."""
    etcd_cert_file: Path | None = None
    """PEM file with the certificate for etcd."""
    etcd_key_file: Path | None = None
    """PEM file with the private key for etcd."""
    tls: TlsConfig = field(default_factory=TlsConfig)
    """Certificates of the Work service."""
    otlp_endpoint: str = ""
    """URL of an OpenTelemetry collector; empty: no export."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages that are logged."""

    def __post_init__(self) -> None:
        for name in ("lease_ttl_s", "orphan_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive", param=name)
        for name in ("drain_s", "echo_tokens_per_second", "echo_load_s", "memory_limit", "threads", "echo_leak_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative", param=name)
        if not 0 <= self.port <= 65_535:
            raise ConfigError("port must be between 0 and 65535", param="port")
        if is_wildcard(self.host) and self.etcd_endpoints:
            raise ConfigError(
                f"No schedulers can connect to {self.host}: give the address at which they reach this worker.",
                param="host",
            )
        if not is_loopback(self.host) and not self.tls.enabled:
            raise ConfigError(
                f"Listening on {self.host} needs TLS: give --tls-ca-file, --tls-cert-file and --tls-key-file "
                "(`llmos certs DIR` makes them).",
                param="tls",
            )

    def etcd(self) -> EtcdConfig | None:
        """How to reach etcd; None: the worker is not to register."""
        if not self.etcd_endpoints:
            return None
        return EtcdConfig(
            endpoints=self.etcd_endpoints,
            user=self.etcd_user,
            password=self.etcd_password,
            ca_file=self.etcd_ca_file,
            cert_file=self.etcd_cert_file,
            key_file=self.etcd_key_file,
        )

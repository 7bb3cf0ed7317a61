"""A scheduler: decides where requests run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmos.addresses import is_loopback, is_wildcard
from llmos.config import TlsConfig
from llmos.errors import ConfigError
from llmos.etcd import EtcdConfig
from scheduler.fairness import CLASSES
from scheduler.policy import Policy
from scheduler.work_client import LinkConfig


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Everything that can be set for one scheduler process."""

    id: str = ""
    """Name of this scheduler, unique per process start; empty: made up."""
    host: str = "127.0.0.1"
    """Address to listen on, and the one that gateways are told. Other than loopback needs TLS."""
    port: int = 7000
    """Port to listen on; 0: a free one."""
    advertise: str = ""
    """host:port that gateways are told, if a proxy or port mapping stands before this scheduler; empty: its own."""
    ready_file: Path | None = None
    """File to write once it serves: JSON with id, pid and port."""
    queue_limit: int = 1024
    """Most requests that wait for a worker; one more is answered 429."""
    queue_token_limit: int = 4_194_304
    """Most tokens, prompts and expected answers, that wait for a worker."""
    order: Literal["fair", "fcfs"] = "fair"
    """Who is served next: `fair` by class and tenant, `fcfs` by arrival alone."""
    class_shares: tuple[float, ...] = (80.0, 15.0, 5.0)
    """Least shares of the classes interactive, standard and batch while all of them wait; relative to each other."""
    ttft_bounds_s: tuple[float, ...] = (30.0, 120.0, 1800.0)
    """Seconds: a request of each class that is predicted to wait longer for its first token is answered 429."""
    lease_ttl_s: float = 3.0
    """Seconds after which a standby may take over from a leader that no longer renews its lease."""
    hedge: bool = True
    """Begin a request whose first token is late on a second worker too, at most one request in twenty; first token
    wins."""
    no_worker_grace_s: float = 60.0
    """Seconds that a request waits while no connected worker could ever serve its model."""
    gateway_grace_s: float = 1.5
    """Seconds that requests outlive their gateway's stream, for it to come back and take them up."""
    replica_up_s: float = 1.0
    """Seconds of need before a model with an allocation gets another replica."""
    replica_down_s: float = 30.0
    """Seconds without need before a replica goes; at least twice the time that loading it takes."""
    replica_idle_s: float = 300.0
    """Seconds without a request before a model's last replica goes, if its allocation lets it."""
    unload_drain_s: float = 10.0
    """Seconds that requests have to finish on a replica that goes; then they move to another."""
    journal_bytes: int = 128 * 1024 * 1024
    """Most bytes of streams that broke or ended and are remembered for their clients to come back."""
    journal_tenant_bytes: int = 32 * 1024 * 1024
    """The same of one tenant."""
    gateway_buffer_bytes: int = 16 * 1024 * 1024
    """Most output that waits for a gateway which does not take it; past it its stream is closed."""
    worker_silence_s: float = 1.75
    """Seconds without a frame after which a worker counts as lost; they come every half second."""
    etcd_endpoints: tuple[str, ...] = ("127.0.0.1:2379",)
    """host:port of etcd's members."""
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
    """Certificates for gateways and workers."""
    otlp_endpoint: str = ""
    """URL of an OpenTelemetry collector; empty: no export."""
    sample_ratio: float = 1.0
    """Share of traces that are exported."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages that are logged."""

    def __post_init__(self) -> None:
        positive = ("queue_limit", "queue_token_limit", "lease_ttl_s", "gateway_buffer_bytes", "worker_silence_s")
        for name in (*positive, "journal_bytes", "journal_tenant_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive", param=name)
        waits = ("replica_up_s", "replica_down_s", "replica_idle_s", "unload_drain_s")
        for name in ("no_worker_grace_s", "gateway_grace_s", *waits):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative", param=name)
        for name in ("class_shares", "ttft_bounds_s"):
            if len(getattr(self, name)) != len(CLASSES) or min(getattr(self, name)) <= 0:
                raise ConfigError(f"{name} must be three positive numbers: interactive, standard, batch", param=name)
        if not 0 <= self.port <= 65_535:
            raise ConfigError("port must be between 0 and 65535", param="port")
        if is_wildcard(self.host):
            raise ConfigError(
                f"No gateways can connect to {self.host}: give the address at which they reach this scheduler.",
                param="host",
            )
        if not is_loopback(self.host) and not self.tls.enabled:
            raise ConfigError(
                f"Listening on {self.host} needs TLS: give --tls-ca-file, --tls-cert-file and --tls-key-file "
                "(`llmos certs DIR` makes them).",
                param="tls",
            )
        if not self.etcd_endpoints:
            raise ConfigError("A scheduler needs etcd (--etcd-endpoints host:port).", param="etcd_endpoints")

    def core_policy(self) -> Policy:
        """The core's numbers: those that can be set, and the defaults of the others."""
        shares, bounds = self.class_shares, self.ttft_bounds_s
        return Policy(
            queue_limit=self.queue_limit,
            queue_token_limit=self.queue_token_limit,
            order=self.order,
            shares=(shares[0], shares[1], shares[2]),
            ttft_bounds_s=(bounds[0], bounds[1], bounds[2]),
            hedge=self.hedge,
            no_worker_grace_s=self.no_worker_grace_s,
            gateway_grace_s=self.gateway_grace_s,
            journal_bytes=self.journal_bytes,
            journal_tenant_bytes=self.journal_tenant_bytes,
            await_promises=True,
            replica_up_s=self.replica_up_s,
            replica_down_s=self.replica_down_s,
            replica_idle_s=self.replica_idle_s,
            unload_drain_s=self.unload_drain_s,
        )

    def links(self) -> LinkConfig:
        """How streams to workers are kept."""
        return LinkConfig(silence_s=self.worker_silence_s)

    def etcd(self) -> EtcdConfig:
        """How to reach etcd."""
        return EtcdConfig(
            endpoints=self.etcd_endpoints,
            user=self.etcd_user,
            password=self.etcd_password,
            ca_file=self.etcd_ca_file,
            cert_file=self.etcd_cert_file,
            key_file=self.etcd_key_file,
        )

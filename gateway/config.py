"""The gateway: OpenAI-compatible HTTP and gRPC in front of a fleet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmos.addresses import is_loopback
from llmos.config import TlsConfig
from llmos.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What the HTTP edge refuses, and how long it waits."""

    max_body_bytes: int = 4 << 20
    """Largest body that is read."""
    max_header_bytes: int = 32 << 10
    """Largest sum of request line and headers."""
    max_json_depth: int = 64
    """Deepest nesting of a body."""
    max_connections: int = 4096
    """Connections past this many are answered 503 and closed."""
    max_requests: int = 2048
    """Requests past this many at a time are answered 429."""
    header_timeout_s: float = 30.0
    """Longest wait for a connection's request line and headers."""
    body_timeout_s: float = 60.0
    """Longest wait for a whole body."""
    write_timeout_s: float = 60.0
    """Longest wait for a client to take what was written; past it the connection is cut."""
    refusal_wait_s: float = 4.0
    """How long a stream's status line waits for the first output, so that a refusal by the fleet is a status."""
    keep_alive_s: float = 10.0
    """Silence in a stream after which a comment is sent, so that proxies keep it open."""
    idle_timeout_s: float = 75.0
    """How long a connection without a request stays open."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Settings of `python -m gateway`."""

    host: str = "127.0.0.1"
    """Address to listen on. Other than loopback needs keys_file and TLS."""
    http_port: int = 8000
    """Port of the OpenAI-compatible API; 0 takes a free one."""
    http_fd: int = -1
    """Descriptor of an inherited socket that listens, in place of `host` and `http_port`; -1: none."""
    grpc_port: int = 8001
    """Port of the gRPC API; 0 takes a free one."""
    share_grpc_port: bool = False
    """Let another process listen on `grpc_port` too, so that the next gateway is up before this one goes."""
    schedulers: tuple[str, ...] = ("127.0.0.1:7000",)
    """host:port of the schedulers; the one that leads is found by asking."""
    id: str = ""
    """Name of this gateway in the fleet; generated if empty."""
    keys_file: Path | None = None
    """API keys, made with `llmos keys add`. Without it any key is accepted, on loopback only."""
    open_metrics: bool = False
    """Whether /metrics needs no operator's key although there are keys."""
    ready_file: Path | None = None
    """Written once requests are served: a JSON object with id, pid and ports."""
    max_requests: int = 4096
    """Most requests that run at once, over HTTP and gRPC together; more are answered 429."""
    prefix_salt: str = ""
    """Secret that prefix-cache keys depend on; the same for all gateways of a fleet."""
    stream_key_file: Path | None = None
    """Keys that seal what other gateways need to go on with a stream: 64 hexadecimal digits, one a line; the first one
    seals. The same for all gateways of a fleet; without it only this one can take its streams up again."""
    drain_s: float = 20.0
    """How long running requests may go on after SIGTERM; a second signal ends them at once."""
    otlp_endpoint: str = ""
    """Where to export spans (OTLP over gRPC); empty: nowhere."""
    sample_ratio: float = 1.0
    """Share of traces that are exported."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much to say in the log."""
    tls: TlsConfig = field(default_factory=TlsConfig)
    """Certificates for all three: HTTP, gRPC and the schedulers."""
    limits: HttpLimits = field(default_factory=HttpLimits)
    """Limits of the HTTP edge."""

    def __post_init__(self) -> None:
        if not self.schedulers:
            raise ConfigError("Name at least one scheduler (--schedulers host:port).", param="schedulers")
        if is_loopback(self.host):
            return
        if self.keys_file is None:
            raise ConfigError(
                f"Listening on {self.host} needs API keys: make some with `llmos keys add` and give --keys-file.",
                param="keys_file",
            )
        if not self.tls.enabled:
            raise ConfigError(
                f"Listening on {self.host} needs TLS: give --tls-ca-file, --tls-cert-file and --tls-key-file "
                "(`llmos certs DIR` makes them).",
                param="tls",
            )

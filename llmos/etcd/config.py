"""What a client must know to reach etcd."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmos.errors import ConfigError


@dataclass(frozen=True)
class EtcdConfig:
    """Addresses, credentials and time limits of one etcd cluster. Raises ConfigError for values that cannot work."""

    endpoints: tuple[str, ...] = ("127.0.0.1:2379",)
    """`host:port` of each member, optionally with `http://` or `https://` in front. They must be one cluster."""

    user: str = ""
    """Name for password authentication; empty: none."""

    password: str = ""
    """Password of `user`."""

    ca_file: Path | None = None
    """PEM file of the authority that signed the servers' certificates. Any of the three files switches TLS on."""

    cert_file: Path | None = None
    """PEM file of this client's certificate chain, if the servers ask for one."""

    key_file: Path | None = None
    """PEM file of the private key of `cert_file`."""

    call_timeout_s: float = 3.0
    """Seconds that a call may take, fail-over between endpoints included, unless it says otherwise."""

    watch_idle_s: float = 2.0
    """Seconds of silence on a watch after which the server must show that it lives, within `call_timeout_s`."""

    def __post_init__(self) -> None:
        if not self.endpoints or not all(self.targets):
            raise ConfigError("etcd needs at least one endpoint of the form host:port", param="endpoints")
        if len({endpoint.startswith("https://") for endpoint in self.endpoints}) > 1 and not self._has_tls_file:
            raise ConfigError("etcd endpoints must be all https:// or none", param="endpoints")
        if self._has_tls_file and any(endpoint.startswith("http://") for endpoint in self.endpoints):
            raise ConfigError("an http:// etcd endpoint cannot be used with TLS files", param="endpoints")
        if (self.cert_file is None) != (self.key_file is None):
            raise ConfigError("etcd's cert_file and key_file go together", param="cert_file")
        if self.password and not self.user:
            raise ConfigError("etcd's password needs a user", param="user")
        if self.call_timeout_s <= 0 or self.watch_idle_s <= 0:
            raise ConfigError("etcd's time limits must be positive", param="call_timeout_s")

    def __repr__(self) -> str:
        """Everything but the password."""
        return f"EtcdConfig(endpoints={self.endpoints}, user={self.user!r}, tls={self.tls})"

    @property
    def _has_tls_file(self) -> bool:
        return any((self.ca_file, self.cert_file, self.key_file))

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return self._has_tls_file or self.endpoints[0].startswith("https://")

    @property
    def targets(self) -> tuple[str, ...]:
        """The endpoints as gRPC targets, without scheme or trailing slash."""
        return tuple(one.removeprefix("https://").removeprefix("http://").rstrip("/") for one in self.endpoints)

"""API keys: a file of salted hashes, each naming a tenant, its class and its role.

A key reads `sk-llmos-ID-SECRET`. The secret has 256 random bits, so one round of SHA-256 is enough; the salt keeps
equal secrets from showing. The file is replaced atomically, readable by its owner only, and read again when it changes,
so that keys come and go without a restart.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import msgspec

from llmos.errors import ConfigError, NotFound, PermissionDenied, Unauthenticated
from llmos.store.lock import acquire
from llmos.tenants import LimitsChange, TenantLimits

log = logging.getLogger(__name__)

Role = Literal["user", "operator"]
Priority = Literal["interactive", "standard", "batch"]

_PREFIX = "sk-llmos-"
_VERSION = 1
_FILE_MODE = 0o600
_WRITERS_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class KeyIdentity:
    """What a key stands for."""

    tenant: str
    role: Role = "user"
    priority: Priority = "standard"
    limits: TenantLimits = field(default_factory=TenantLimits)

    def require_operator(self) -> None:
        """Raise PermissionDenied unless this is an operator."""
        if self.role != "operator":
            raise PermissionDenied("This call needs an operator's key.")


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key as the file holds it. The key itself is not in it. Weight and limits are the tenant's, the same in
    all its keys."""

    id: str
    tenant: str
    role: Role
    priority: Priority
    salt: str
    hash: str
    created_unix_s: int = 0
    weight: int = 1
    max_requests: int = 0
    tokens_per_minute: int = 0

    @property
    def limits(self) -> TenantLimits:
        """The tenant's part of the fleet. Raises ConfigError."""
        return TenantLimits(self.weight, self.max_requests, self.tokens_per_minute)

    @property
    def identity(self) -> KeyIdentity:
        """What the key stands for."""
        return KeyIdentity(self.tenant, self.role, self.priority, self.limits)

    def matches(self, secret: str) -> bool:
        """Whether `secret` is this key's; takes the same time either way."""
        return hmac.compare_digest(self.hash, _digest(self.salt, secret))


class _Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    keys: list[KeyRecord]


_NOBODY = KeyRecord(id="", tenant="", role="user", priority="standard", salt="", hash="")
_ANYBODY = KeyIdentity("default", "operator")


def read_keys(file: Path) -> list[KeyRecord]:
    """The records of a keys file. Raises ConfigError if it cannot be read or is no keys file."""
    try:
        document = msgspec.json.decode(file.read_bytes(), type=_Document)
    except OSError as error:
        raise ConfigError(f"cannot read the keys file {file}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a keys file: {error}") from error
    if document.version != _VERSION:
        raise ConfigError(f"{file} has version {document.version}; this release reads {_VERSION}")
    for record in document.keys:
        _ = record.limits  # within their bounds
    return document.keys


def add_key(
    file: Path,
    tenant: str,
    *,
    role: Role = "user",
    priority: Priority = "standard",
    limits: LimitsChange | None = None,
    now_unix_s: int = 0,
) -> tuple[str, KeyRecord]:
    """Make a key and append it to `file`, which is created if need be. Returns the key, shown only this once.

    `limits` change what the tenant's other keys say too; what is left out is taken over from them.
    """
    if not tenant or len(tenant) > 128 or not tenant.isprintable():
        raise ConfigError("A tenant's name must have 1 to 128 printable characters.", param="tenant")
    if role not in get_args(Role) or priority not in get_args(Priority):
        raise ConfigError(f"A role is one of {get_args(Role)}, a class one of {get_args(Priority)}.", param="role")
    secret, salt = secrets.token_urlsafe(32), secrets.token_hex(16)
    with _alone(file):
        records = read_keys(file) if file.exists() else []
        taken = {record.id for record in records}
        key_id = next(name for name in iter(lambda: secrets.token_hex(4), "") if name not in taken)
        record = KeyRecord(
            id=key_id,
            tenant=tenant,
            role=role,
            priority=priority,
            salt=salt,
            hash=_digest(salt, secret),
            created_unix_s=now_unix_s,
        )
        records = _limited([*records, record], tenant, (limits or LimitsChange()).applied(_limits_of(records, tenant)))
        _write(file, records)
    return f"{_PREFIX}{key_id}-{secret}", records[-1]


def set_limits(file: Path, tenant: str, limits: LimitsChange) -> TenantLimits:
    """Change a tenant's weight and limits in all its keys. Returns the new ones. Raises NotFound, ConfigError."""
    with _alone(file):
        records = read_keys(file)
        if all(record.tenant != tenant for record in records):
            raise NotFound(f"There is no key of tenant '{tenant}'; `llmos keys ls` shows them.", param="tenant")
        wanted = limits.applied(_limits_of(records, tenant))
        _write(file, _limited(records, tenant, wanted))
    return wanted


def _limits_of(records: list[KeyRecord], tenant: str) -> TenantLimits:
    return next((record.limits for record in records if record.tenant == tenant), TenantLimits())


def _limited(records: list[KeyRecord], tenant: str, limits: TenantLimits) -> list[KeyRecord]:
    """The records, those of one tenant with its limits."""
    given = asdict(limits)
    return [msgspec.structs.replace(one, **given) if one.tenant == tenant else one for one in records]


def remove_key(file: Path, key_id: str) -> KeyRecord:
    """Take a key out of `file`. Raises NotFound if there is none of that id."""
    with _alone(file):
        records = read_keys(file)
        gone = next((record for record in records if record.id == key_id), None)
        if gone is None:
            raise NotFound(f"There is no key '{key_id}'; `llmos keys ls` shows them.", param="id")
        _write(file, [record for record in records if record is not gone])
    return gone


class KeyRing:
    """Who may call. Without a file everybody is the operator of tenant `default`, whatever key they show."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._stamp: tuple[int, int, int] | None = None
        self._keys: Mapping[str, KeyRecord] = {}
        if file is not None:
            self._stamp = _stamp(file)
            self._keys = {record.id: record for record in read_keys(file)}

    @property
    def open(self) -> bool:
        """Whether anybody may call."""
        return self._file is None

    def authenticate(self, authorization: str | None) -> KeyIdentity:
        """Whom the header `Bearer KEY` names. Raises Unauthenticated."""
        if self._file is None:
            return _ANYBODY
        self._refresh(self._file)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("Send your API key in the header 'Authorization: Bearer KEY'.")
        key_id, _, secret = key.strip().removeprefix(_PREFIX).partition("-")
        record = self._keys.get(key_id)
        # The comparison is made for unknown ids too, so that time does not tell which ids exist.
        if not (record or _NOBODY).matches(secret) or record is None:
            raise Unauthenticated("This API key is not valid.")
        return record.identity

    def _refresh(self, file: Path) -> None:
        stamp = _stamp(file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = {record.id: record for record in read_keys(file)}
        except ConfigError as error:
            log.error("the keys in use stay as they were: %s", error.message)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None if it is gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _digest(salt: str, secret: str) -> str:
    return hashlib.sha256(f"{salt}:{secret}".encode()).hexdigest()


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Keep other writers of `file` out; without this, of two keys added at once one would be lost.

    The lock is on the folder, as the file itself is replaced by each write.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not acquire(folder, _WRITERS_WAIT_S):
            raise ConfigError(f"another process has been writing {file.name} for {_WRITERS_WAIT_S:.0f} s; try again")
        yield
    finally:
        os.close(folder)


def _write(file: Path, records: list[KeyRecord]) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            os.fchmod(out.fileno(), _FILE_MODE)
            out.write(msgspec.json.format(msgspec.json.encode(_Document(version=_VERSION, keys=records)), indent=1))
            out.flush()
            os.fsync(out.fileno())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)

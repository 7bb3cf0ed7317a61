"""Keys, values and transactions: the values that callers see, and how they become requests. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmos.etcd import messages as pb


@dataclass(frozen=True)
class KeyValue:
    """One key as etcd stores it."""

    key: str
    """The whole key. Bytes that are no UTF-8 (somebody else's key) are kept as surrogate escapes."""

    value: bytes
    """The value; empty is a value."""

    create_revision: int
    """Revision in which the key came into being; a deleted and re-created key gets a new one."""

    mod_revision: int
    """Revision of the last change; what compare-and-swap compares."""

    version: int
    """Number of changes since creation, from 1."""

    lease: int
    """Id of the lease that the key lives under, or 0."""


@dataclass(frozen=True)
class Compare:
    """One condition of a transaction: `field` of `key` `operator` `operand`.

    A key that does not exist has version, revisions and lease 0, and satisfies no comparison of its value.
    """

    key: str
    field: Literal["version", "create_revision", "mod_revision", "value", "lease"]
    operator: Literal["==", "!=", "<", ">"]
    operand: int | bytes


@dataclass(frozen=True)
class Put:
    """Write `value` under `lease_id` (0: no lease)."""

    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True)
class Get:
    """Read `key`, or everything that starts with it."""

    key: str
    prefix: bool = False


@dataclass(frozen=True)
class Delete:
    """Delete `key`, or everything that starts with it."""

    key: str
    prefix: bool = False


Operation = Put | Get | Delete


@dataclass(frozen=True)
class TxnResult:
    """What a transaction did."""

    succeeded: bool
    """Whether every condition held, so that `then` ran; else `otherwise` did."""

    revision: int
    """The store's revision after it. For a transaction that wrote: the mod_revision of what it wrote."""

    rows: tuple[tuple[KeyValue, ...], ...]
    """Per operation that ran, in order: what a Get found; empty for Put and Delete."""


_TARGETS = {
    "version": "VERSION",
    "create_revision": "CREATE",
    "mod_revision": "MOD",
    "value": "VALUE",
    "lease": "LEASE",
}
_OPERATORS = {"==": "EQUAL", "!=": "NOT_EQUAL", "<": "LESS", ">": "GREATER"}


def encode_key(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def decode_key(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def key_range(key: str, *, prefix: bool) -> tuple[bytes, bytes]:
    """Return (key, range_end) that select `key`, or with `prefix` everything that starts with it ("": all keys)."""
    start = encode_key(key)
    if not prefix:
        return start, b""
    if not start:
        return b"\0", b"\0"
    head = start.rstrip(b"\xff")
    return start, head[:-1] + bytes([head[-1] + 1]) if head else b"\0"


def key_value(raw: Any) -> KeyValue:
    """From etcd's own message."""
    return KeyValue(
        key=decode_key(raw.key),
        value=raw.value,
        create_revision=raw.create_revision,
        mod_revision=raw.mod_revision,
        version=raw.version,
        lease=raw.lease,
    )


def put_request(put: Put) -> Any:
    return pb.PutRequest(key=encode_key(put.key), value=put.value, lease=put.lease_id)


def get_request(get: Get) -> Any:
    key, range_end = key_range(get.key, prefix=get.prefix)
    return pb.RangeRequest(key=key, range_end=range_end)


def delete_request(delete: Delete) -> Any:
    key, range_end = key_range(delete.key, prefix=delete.prefix)
    return pb.DeleteRangeRequest(key=key, range_end=range_end)


def txn_request(compares: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation]) -> Any:
    return pb.TxnRequest(
        compare=[_compare(one) for one in compares],
        success=[_operation(one) for one in then],
        failure=[_operation(one) for one in otherwise],
    )


def txn_result(response: Any) -> TxnResult:
    rows = tuple(tuple(key_value(kv) for kv in one.response_range.kvs) for one in response.responses)
    return TxnResult(succeeded=response.succeeded, revision=response.header.revision, rows=rows)


def _compare(compare: Compare) -> Any:
    kind = pb.Compare
    return kind(
        key=encode_key(compare.key),
        target=kind.CompareTarget.Value(_TARGETS[compare.field]),
        result=kind.CompareResult.Value(_OPERATORS[compare.operator]),
        **{compare.field: compare.operand},
    )


def _operation(operation: Operation) -> Any:
    match operation:
        case Put():
            return pb.RequestOp(request_put=put_request(operation))
        case Get():
            return pb.RequestOp(request_range=get_request(operation))
        case Delete():
            return pb.RequestOp(request_delete_range=delete_request(operation))

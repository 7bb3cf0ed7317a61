"""The methods of etcd's API that we call: path and type of the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos.etcd import messages as pb


@dataclass(frozen=True)
class Rpc:
    """One method. The answer's type is looked up by name, so that importing this module reads no descriptors."""

    path: str
    answer: str

    def serialize(self, request: Any) -> bytes:
        encoded: bytes = request.SerializeToString()
        return encoded

    def deserialize(self, data: bytes) -> Any:
        return getattr(pb, self.answer).FromString(data)


RANGE = Rpc("/etcdserverpb.KV/Range", "RangeResponse")
PUT = Rpc("/etcdserverpb.KV/Put", "PutResponse")
DELETE_RANGE = Rpc("/etcdserverpb.KV/DeleteRange", "DeleteRangeResponse")
TXN = Rpc("/etcdserverpb.KV/Txn", "TxnResponse")
LEASE_GRANT = Rpc("/etcdserverpb.Lease/LeaseGrant", "LeaseGrantResponse")
LEASE_REVOKE = Rpc("/etcdserverpb.Lease/LeaseRevoke", "LeaseRevokeResponse")
LEASE_KEEP_ALIVE = Rpc("/etcdserverpb.Lease/LeaseKeepAlive", "LeaseKeepAliveResponse")
AUTHENTICATE = Rpc("/etcdserverpb.Auth/Authenticate", "AuthenticateResponse")
WATCH = Rpc("/etcdserverpb.Watch/Watch", "WatchResponse")

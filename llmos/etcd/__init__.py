"""etcd over asyncio: several endpoints, leases with a client-side deadline, watches that miss nothing, elections."""

from llmos.etcd.client import EtcdClient
from llmos.etcd.config import EtcdConfig
from llmos.etcd.election import Election, Leader
from llmos.etcd.kv import Compare, Delete, Get, KeyValue, Put, TxnResult
from llmos.etcd.lease import Lease
from llmos.etcd.watch import Watch, WatchBatch, WatchEvent

__all__ = [
    "Compare",
    "Delete",
    "Election",
    "EtcdClient",
    "EtcdConfig",
    "Get",
    "KeyValue",
    "Leader",
    "Lease",
    "Put",
    "TxnResult",
    "Watch",
    "WatchBatch",
    "WatchEvent",
]

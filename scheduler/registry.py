"""Keys and records in etcd, as the scheduler reads and writes them: protobuf's JSON, readable with etcdctl."""

from __future__ import annotations

import logging
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from llmos.internal.v1 import registry_pb2

log = logging.getLogger(__name__)

WORKERS = "/llmos/v1/workers/"
SCHEDULERS = "/llmos/v1/schedulers/"
LEADER = "/llmos/v1/leader"
SERVICE = "/llmos/v1/service"
ALLOCATIONS = "/llmos/v1/allocations/"
ASSIGNMENTS = "/llmos/v1/assignments/"

_M = TypeVar("_M", bound=Message)


def read(key: str, value: bytes, into: _M) -> _M | None:
    """A record of any kind; None, and a line in the log, if it cannot be read."""
    try:
        json_format.Parse(value, into, ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError):
        log.warning("the record at %s cannot be read; it is ignored", key)
        return None
    return into


def worker_record(key: str, value: bytes) -> registry_pb2.WorkerRecord | None:
    """A worker's record; None, and a line in the log, if it is none."""
    record = read(key, value, registry_pb2.WorkerRecord())
    if record is not None and (record.worker_id != key.removeprefix(WORKERS) or not record.address):
        log.warning("the record at %s names another worker or no address; it is ignored", key)
        return None
    return record


def scheduler_record(value: bytes) -> registry_pb2.SchedulerRecord:
    """A scheduler's record, of those that run or of the leader; an empty one if it cannot be read."""
    return read(SCHEDULERS, value, registry_pb2.SchedulerRecord()) or registry_pb2.SchedulerRecord()


def service_record(value: bytes) -> registry_pb2.ServiceRecord:
    """What an earlier leader wrote of service; an empty one if it cannot be read."""
    return read(SERVICE, value, registry_pb2.ServiceRecord()) or registry_pb2.ServiceRecord()


def to_bytes(record: Message) -> bytes:
    """As it is stored."""
    return json_format.MessageToJson(record, preserving_proto_field_name=True, indent=None).encode()

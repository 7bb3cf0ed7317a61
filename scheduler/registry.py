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


def worker_record(key: str, value: bytes) -> registry_pb2.WorkerRecord | None:
    """A worker's record; None, and a line in the log, if it is none."""
    record = registry_pb2.WorkerRecord()
    try:
        json_format.Parse(value, record, ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError):
        log.warning("the record at %s cannot be read; it is ignored", key)
        return None
    if record.worker_id != key.removeprefix(WORKERS) or not record.address:
        log.warning("the record at %s names another worker or no address; it is ignored", key)
        return None
    return record


def scheduler_record(value: bytes) -> registry_pb2.SchedulerRecord:
    """A scheduler's record; an empty one if it cannot be read."""
    record = registry_pb2.SchedulerRecord()
    try:
        json_format.Parse(value, record, ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError):
        log.warning("a scheduler's record cannot be read; it is ignored")
        return registry_pb2.SchedulerRecord()
    return record


def service_record(value: bytes) -> registry_pb2.ServiceRecord:
    """What an earlier leader wrote of service; an empty one if it cannot be read."""
    record = registry_pb2.ServiceRecord()
    try:
        json_format.Parse(value, record, ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError):
        log.warning("the record of service cannot be read; it is ignored")
        return registry_pb2.ServiceRecord()
    return record


def read(key: str, value: bytes, into: _M) -> _M | None:
    """A record of any kind; None, and a line in the log, if it cannot be read."""
    try:
        json_format.Parse(value, into, ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError):
        log.warning("the record at %s cannot be read; it is ignored", key)
        return None
    return into


def to_bytes(record: Message) -> bytes:
    """As it is stored."""
    return json_format.MessageToJson(record, preserving_proto_field_name=True, indent=None).encode()

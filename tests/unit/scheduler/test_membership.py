"""Records in etcd become events; a list that lacks somebody is not taken at its word."""

from __future__ import annotations

import asyncio
import random
from typing import cast

from google.protobuf import json_format

from llmos.etcd import EtcdClient, WatchBatch, WatchEvent
from llmos.internal.v1 import registry_pb2
from scheduler import events, registry
from scheduler.directory import SchedulerDirectory
from scheduler.membership import Membership
from tests.fakes.contract import make_record

CLIENT = cast(EtcdClient, None)


def put(worker_id: str) -> WatchEvent:
    value = json_format.MessageToJson(make_record(worker_id), preserving_proto_field_name=True).encode()
    return WatchEvent(registry.WORKERS + worker_id, value, 1)


def gone(worker_id: str) -> WatchEvent:
    return WatchEvent(registry.WORKERS + worker_id, None, 2)


class Collector:
    def __init__(self, rejoin_s: float = 0.0) -> None:
        self.seen: list[str] = []
        self.membership = Membership(CLIENT, self.post, random.Random(1), rejoin_s=rejoin_s)

    def post(self, event: events.Event) -> None:
        if isinstance(event, events.WorkerRegistered):
            self.seen.append(f"+{event.record.worker_id}")
        elif isinstance(event, events.WorkerDeregistered):
            self.seen.append(f"-{event.worker_id}")
        else:
            self.seen.append(type(event).__name__)

    def take(self, *changes: WatchEvent, snapshot: bool = False) -> None:
        self.membership.take(WatchBatch(list(changes), 1, snapshot))


async def test_first_list_then_changes() -> None:
    collector = Collector()
    collector.take(put("w1"), put("w2"), snapshot=True)
    collector.take(gone("w1"))
    collector.take(put("w3"))
    assert collector.seen == ["+w1", "+w2", "MembersListed", "-w1", "+w3"]


async def test_missing_from_a_later_list_is_gone_only_after_a_while() -> None:
    collector = Collector()
    collector.take(put("w1"), put("w2"), snapshot=True)
    collector.take(put("w2"), snapshot=True)
    assert collector.seen[3:] == ["+w2"]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert collector.seen[4:] == ["-w1"]


async def test_who_registers_again_in_time_was_never_gone() -> None:
    collector = Collector()
    collector.take(put("w1"), snapshot=True)
    collector.take(snapshot=True)
    collector.take(put("w1"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert collector.seen == ["+w1", "MembersListed", "+w1"]


async def test_records_that_cannot_be_read_are_ignored() -> None:
    collector = Collector()
    collector.take(
        WatchEvent(registry.WORKERS + "w1", b"\xff not json", 1),
        WatchEvent(registry.WORKERS + "w2", put("w1").value, 1),
        snapshot=True,
    )
    assert collector.seen == ["MembersListed"]


def test_directory_follows_schedulers() -> None:
    directory = SchedulerDirectory(CLIENT)
    record = registry_pb2.SchedulerRecord(scheduler_id="s1", address="a:1")
    directory.take(WatchBatch([WatchEvent(registry.SCHEDULERS + "s1", registry.to_bytes(record), 1)], 1, True))
    assert directory.records() == [record]
    directory.take(WatchBatch([WatchEvent(registry.SCHEDULERS + "s1", None, 2)], 2, False))
    assert directory.records() == []
    directory.take(WatchBatch([WatchEvent(registry.SCHEDULERS + "s1", b"{", 3)], 3, False))
    assert directory.records() == []

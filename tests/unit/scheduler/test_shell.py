"""The loop, the stage spans and the configuration; and that the core is what it says: pure."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import random
from pathlib import Path

import grpc
import pytest

import scheduler
from llmos.config import TlsConfig, load
from llmos.errors import ConfigError
from llmos.internal.v1 import request_pb2, work_pb2
from llmos.telemetry import Telemetry
from llmos.v1 import fleet_pb2
from scheduler import commands, events
from scheduler.config import SchedulerConfig
from scheduler.core import Core
from scheduler.loop import Loop
from scheduler.policy import Policy
from scheduler.spans import StageSpans
from scheduler.work_client import LinkConfig, LinkContext, WorkerLinks
from tests.fakes.clock import ManualClock
from tests.fakes.contract import make_record, make_request

PURE = [
    "admission", "budget", "catalogue", "charges", "commands", "core", "deadlines", "decay", "dispatch",
    "draining", "events", "explain", "fairness", "forecast", "frames", "health", "journal", "learning",
    "ledger", "lifecycle", "load_view", "loads", "members", "meters", "outflow", "overload", "placement",
    "policy", "pools", "preemption", "prefix_index", "priorities", "quotas", "recent", "requests", "service",
    "span_ring", "slope", "stalls", "state", "suspects", "takeover", "timers", "timing", "trust", "usage",
    "views", "waiting", "workers", "allocation/__init__", "allocation/assignments", "allocation/book",
    "allocation/check", "allocation/claims", "allocation/control", "allocation/holdings", "allocation/leaving",
    "allocation/replicas", "allocation/shares",
    "replica", "replication",
]  # fmt: skip
TLS = TlsConfig(ca_file=Path("ca.pem"), cert_file=Path("cert.pem"), key_file=Path("key.pem"))
FORBIDDEN = {"asyncio", "grpc", "opentelemetry", "random", "secrets", "socket", "threading", "time", "datetime", "os"}


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_no_world(name: str) -> None:
    folder = Path(next(iter(scheduler.__path__)))
    tree = ast.parse((folder / f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module.split(".")[0] for module in imported} & FORBIDDEN
    assert not {module for module in imported if module.startswith(("llmos.etcd", "llmos.rpc", "llmos.clock"))}
    siblings = {module.split(".", 1)[1].replace(".", "/") for module in imported if module.startswith("scheduler.")}
    assert siblings - {"allocation"} <= set(PURE)


class Recorder:
    """A carrier that remembers."""

    def __init__(self) -> None:
        self.carried: list[commands.Command] = []
        self.flushes = 0

    def carry(self, command: commands.Command) -> None:
        self.carried.append(command)

    def flush(self) -> None:
        self.flushes += 1


async def turns() -> None:
    """Let other tasks run for a while."""
    for _ in range(10):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def running(loop: Loop):  # type: ignore[no-untyped-def]
    task = asyncio.create_task(loop.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_loop_batches_what_is_there() -> None:
    recorder = Recorder()
    loop = Loop(Core("s", 1, Policy(), 0.0), recorder, ManualClock())
    for number in range(10):
        loop.post_now(events.WorkerRegistered(make_record(f"w{number}")))
    async with running(loop):
        await turns()
    assert len(recorder.carried) == 10
    assert recorder.flushes == 1


async def test_full_loop_makes_posters_wait() -> None:
    loop = Loop(Core("s", 1, Policy(), 0.0), Recorder(), ManualClock(), limit=2)
    posted: list[int] = []

    async def post() -> None:
        for number in range(5):
            await loop.post(events.Tick())
            posted.append(number)

    task = asyncio.create_task(post())
    await turns()
    assert posted == [0, 1]
    async with running(loop):
        await asyncio.wait_for(task, 10)
    assert posted == [0, 1, 2, 3, 4]


async def test_a_bug_in_the_core_does_not_stop_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    loop = Loop(Core("s", 1, Policy(), 0.0), recorder, ManualClock())
    loop.post_now("no event")  # type: ignore[arg-type]
    loop.post_now(events.WorkerRegistered(make_record("w1")))
    async with running(loop):
        await turns()
    assert loop.errors == 1
    assert len(recorder.carried) == 1


def test_stage_spans_follow_an_attempt() -> None:
    clock = ManualClock()
    telemetry = Telemetry("scheduler", "s", clock=clock)
    spans = StageSpans(telemetry)
    request = make_request("r1")
    start = commands.StartAttempt("w1", request, request_pb2.Epoch(attempt=1), model_version="v1")
    dispatch = work_pb2.Dispatch()
    for command in (
        commands.Queued(request),
        start,
        commands.FirstToken("r1", 1),
        commands.AttemptOver("r1", 1, "", 5),
        commands.RequestOver("r1", ""),
    ):
        clock.advance(1.0)
        if command is start:
            start.write(dispatch, spans.started(start))
        else:
            spans.observe(command)
    assert len(spans) == 0
    found = {span.name: span for span in telemetry.drain()}
    seconds = {name: (span.end_unix_ns - span.start_unix_ns) / 1e9 for name, span in found.items()}
    assert seconds == pytest.approx({"queue": 1.0, "prefill": 1.0, "decode": 1.0, "attempt": 2.0})
    assert {span.attributes["llmos.request_id"] for span in found.values()} == {"r1"}
    assert found["attempt"].attributes["llmos.tokens"] == "5"
    assert dispatch.trace.traceparent.split("-")[2] == found["attempt"].span_id.hex()


def test_spans_of_a_lost_reign_are_closed() -> None:
    telemetry = Telemetry("scheduler", "s", clock=ManualClock())
    spans = StageSpans(telemetry)
    spans.observe(commands.Queued(make_request("waiting")))
    spans.observe(commands.Queued(make_request("running")))
    spans.started(commands.StartAttempt("w1", make_request("running"), request_pb2.Epoch(), model_version="v1"))
    spans.abandon("not_leader")
    assert sorted((s.name, s.error) for s in telemetry.drain() if s.error) == [
        ("attempt", "not_leader"),
        ("prefill", "not_leader"),
        ("queue", "not_leader"),
    ]


@pytest.mark.parametrize(
    "field",
    [
        {"queue_limit": 0},
        {"class_shares": (1.0, 2.0)},
        {"ttft_bounds_s": (1.0, 0.0, 3.0)},
        {"port": 70_000},
        {"lease_ttl_s": 0.0},
        {"etcd_endpoints": ""},
        {"gateway_grace_s": -1.0},
        {"host": "10.0.0.1"},
        {"host": "0.0.0.0", "tls": TLS},
    ],
)
def test_bad_configuration_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        load(SchedulerConfig, "scheduler", environ={}, overrides=field)


def test_off_loopback_certificates_are_enough() -> None:
    assert SchedulerConfig(host="10.0.0.1", tls=TLS).tls.enabled


async def test_a_bug_on_the_way_to_a_worker_does_not_lose_it_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    dialled = asyncio.Event()
    tries: list[str] = []

    def connect(address: str) -> grpc.aio.Channel:
        tries.append(address)
        if len(tries) == 1:
            raise RuntimeError("a bug")
        dialled.set()
        return grpc.aio.insecure_channel(address)

    async def post(event: events.Event) -> None:
        raise AssertionError("nobody listens there")

    links = WorkerLinks(
        LinkContext(
            scheduler_id="s",
            term=lambda: 1,
            connect=connect,
            post=post,
            post_now=lambda event: None,
            refused=lambda: None,
            keep_spans=lambda spans: None,
            clock=ManualClock(),
            rng=random.Random(1),
            config=LinkConfig(),
        )
    )
    links.dial("w1", "127.0.0.1:1")
    try:
        await asyncio.wait_for(dialled.wait(), 10)
    finally:
        await links.close()
    assert "a bug" in caplog.text


def test_configuration_reaches_core_and_links() -> None:
    config = load(
        SchedulerConfig, "scheduler", environ={"LLMOS_SCHEDULER_QUEUE_LIMIT": "7"}, overrides={"worker_silence_s": 3.0}
    )
    assert config.core_policy().queue_limit == 7
    assert config.links().silence_s == 3.0
    assert config.etcd().endpoints == ("127.0.0.1:2379",)


def test_gateway_that_leaves_twice_is_gone_once() -> None:
    core = Core("s", 1, Policy(), 0.0)
    core.handle(events.GatewayConnected(1, fleet_pb2.Node(id="g")), 0.0)
    core.handle(events.GatewayLost(1), 0.0)
    assert core.handle(events.GatewayLost(1), 0.1) == []

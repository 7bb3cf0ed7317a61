"""Spans are recorded whatever the sampler says, with times of the injected clock."""

from __future__ import annotations

import pytest
from opentelemetry.trace import SpanKind

from llmos.telemetry import Telemetry, remote_context, trace_headers, trace_id_hex
from tests.fakes.clock import ManualClock


def make(ratio: float = 1.0) -> tuple[Telemetry, ManualClock]:
    clock = ManualClock(start=50.0)
    return Telemetry("scheduler", "s-1", clock=clock, sample_ratio=ratio), clock


def sampled(traceparent: str) -> bool:
    return bool(int(traceparent.rsplit("-", 1)[1], 16) & 1)


def test_span_times_come_from_the_clock() -> None:
    telemetry, clock = make()
    span = telemetry.start("queue", attributes={"llmos.request_id": "r1"})
    clock.advance(2.5)
    telemetry.finish(span)
    (record,) = telemetry.drain()
    assert (record.start_unix_ns, record.end_unix_ns) == (50_000_000_000, 52_500_000_000)
    assert record.attributes["llmos.request_id"] == "r1"
    assert (record.service, record.node, record.parent_span_id) == ("scheduler", "s-1", b"")


def test_unsampled_spans_are_recorded_and_say_so_in_the_header() -> None:
    telemetry, _ = make(ratio=0.0)
    span = telemetry.start("chat m", kind=SpanKind.SERVER)
    traceparent, _ = trace_headers(span)
    telemetry.finish(span)
    assert not sampled(traceparent)
    assert [record.name for record in telemetry.drain()] == ["chat m"]


def test_a_remote_parent_keeps_its_trace() -> None:
    upstream, _ = make()
    parent = upstream.start("chat m")
    downstream, _ = make(ratio=0.0)
    child = downstream.start("queue", parent=remote_context(*trace_headers(parent)))
    assert trace_id_hex(child) == trace_id_hex(parent)
    assert sampled(trace_headers(child)[0])
    downstream.finish(child, error="worker_lost")
    (record,) = downstream.drain()
    assert record.parent_span_id == parent.get_span_context().span_id.to_bytes(8, "big")
    assert record.error == "worker_lost"


def test_malformed_headers_mean_no_parent() -> None:
    assert remote_context("") is None
    assert remote_context("00-zz-11-01") is None
    assert remote_context("00-" + "0" * 32 + "-" + "0" * 16 + "-01") is None


def test_the_backlog_is_bounded_and_drops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmos.telemetry._KEEP", 8)
    telemetry, _ = make()
    for number in range(8 + 3):
        telemetry.finish(telemetry.start(str(number)))
    assert telemetry.dropped == 3
    assert telemetry.drain(limit=1)[0].name == "3"

"""The ring behind `llmos trace`."""

from __future__ import annotations

from llmos.telemetry import REQUEST_ID
from llmos.v1 import fleet_pb2
from scheduler.span_ring import SpanRing


def span(trace: int, number: int, request_id: str = "", start: int = 0) -> fleet_pb2.Span:
    attributes = {REQUEST_ID: request_id} if request_id else {}
    return fleet_pb2.Span(
        trace_id=trace.to_bytes(16, "big"),
        span_id=number.to_bytes(8, "big"),
        start_unix_ns=start,
        attributes=attributes,
    )


def test_found_by_request_and_by_trace() -> None:
    ring = SpanRing()
    ring.add([span(1, 2, "r1", start=5), span(1, 1, "r1", start=3), span(2, 1, "r2")])
    assert [found.start_unix_ns for found in ring.get("r1")] == [3, 5]
    assert len(ring.get(f"{1:032x}")) == 2
    assert ring.get("nobody") == []
    assert ring.get("x" * 32) == []


def test_a_client_trace_with_many_requests_is_told_apart() -> None:
    ring = SpanRing()
    ring.add([span(1, 1, "r1"), span(1, 2, "r2"), span(1, 3)])
    assert len(ring.get("r1")) == 2
    assert len(ring.get(f"{1:032x}")) == 3


def test_the_same_span_twice_is_one() -> None:
    ring = SpanRing()
    ring.add([span(1, 1, "r1"), span(1, 1, "r1")])
    assert len(ring.get("r1")) == 1


def test_bounded_in_traces_and_in_spans() -> None:
    ring = SpanRing(traces=2, spans_per_trace=3)
    ring.add([span(1, 1, "r1"), span(2, 1, "r2")])
    ring.add([span(1, 2, "r1")])
    ring.add([span(3, 1, "r3")])
    assert ring.get("r2") == []
    assert len(ring.get("r1")) == 2
    ring.add([span(3, number, "r3") for number in range(2, 9)])
    assert len(ring.get("r3")) == 3
    assert ring.dropped == 5


def test_all_traces_together_are_bounded_too() -> None:
    ring = SpanRing(traces=100, spans_per_trace=10, spans=25)
    for trace in range(1, 6):
        ring.add([span(trace, number, f"r{trace}") for number in range(10)])
    assert sum(len(ring.get(f"r{trace}")) for trace in range(1, 6)) == 20
    assert [len(ring.get(f"r{trace}")) for trace in (4, 5)] == [10, 10]


def test_one_trace_larger_than_the_ring_keeps_its_first_spans() -> None:
    ring = SpanRing(traces=2, spans_per_trace=10, spans=4)
    ring.add([span(1, number, "r") for number in range(10)])
    assert len(ring.get("r")) == 4
    assert ring.dropped == 6

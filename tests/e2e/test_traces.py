"""One trace per request across the services, from an OTLP collector and, without one, from `llmos trace`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fakes.collector import Collector
from tests.fakes.fleet import Fleet, running_fleet, wait_for

GATEWAY = {"chat echo", "tokenize", "first_output", "stream"}
EXPECTED = GATEWAY | {"queue", "attempt", "prefill", "decode", "execute"}


def start(folder: Path, *flags: str) -> Iterator[Fleet]:
    with running_fleet(folder) as fleet:
        with fleet.together():
            fleet.scheduler(*flags)
            fleet.worker("--backend", "echo", "--echo-tokens-per-second", "40", *flags)
            fleet.gateway(*flags)
        fleet.wait_ready()
        yield fleet


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    yield from start(tmp_path_factory.mktemp("traced"), "--otlp-endpoint", collector.endpoint)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    yield from start(tmp_path_factory.mktemp("plain"))


def ask(fleet: Fleet, traceparent: str) -> str:
    """One streamed chat inside the caller's own trace; its request id."""
    body = {"model": "echo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "stream": True}
    headers = {"traceparent": traceparent}
    with httpx.stream("POST", f"{fleet.http}/v1/chat/completions", json=body, headers=headers, timeout=20) as answer:
        assert answer.status_code == 200
        assert answer.read().rstrip().endswith(b"[DONE]")
        return answer.headers["x-request-id"]


def new_parent(flags: str = "01") -> tuple[str, str, str]:
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return f"00-{trace}-{span}-{flags}", trace, span


def assert_tree(edges: dict[str, str], names_by_id: dict[str, str], outer: str) -> None:
    """Exactly one span hangs below the caller's, every other one below a span of the trace."""
    roots = [span for span, parent in edges.items() if parent == outer]
    assert [names_by_id[root] for root in roots] == ["chat echo"]
    assert all(parent in edges for span, parent in edges.items() if span not in roots)
    parent_name = {names_by_id[span]: names_by_id[parent] for span, parent in edges.items() if parent in names_by_id}
    assert parent_name["tokenize"] == parent_name["first_output"] == parent_name["stream"] == "chat echo"
    assert parent_name["queue"] == parent_name["attempt"] == "chat echo"
    assert parent_name["prefill"] == parent_name["decode"] == parent_name["execute"] == "attempt"


def covered(root: tuple[int, int], children: list[tuple[int, int]]) -> float:
    """Share of the root's time that lies in at least one child."""
    total, reached = 0, root[0]
    for begin, end in sorted(children):
        begin, end = max(begin, reached), min(end, root[1])
        if end > begin:
            total, reached = total + end - begin, end
    return total / (root[1] - root[0])


def test_a_collector_sees_one_whole_tree(traced: Fleet, collector: Collector) -> None:
    parent, trace, outer = new_parent()
    ask(traced, parent)
    wait_for(lambda: {s.name for _, s in collector.spans(trace)} >= EXPECTED, "all spans to be exported")
    spans = collector.spans(trace)
    assert {service for service, _ in spans} == {"llmos-gateway", "llmos-scheduler", "llmos-worker"}
    edges = {span.span_id.hex(): span.parent_span_id.hex() for _, span in spans}
    assert_tree(edges, {span.span_id.hex(): span.name for _, span in spans}, outer)
    root = next(span for _, span in spans if span.name == "chat echo")
    below = [(s.start_time_unix_nano, s.end_time_unix_nano) for _, s in spans if s is not root]
    assert covered((root.start_time_unix_nano, root.end_time_unix_nano), below) >= 0.95


def test_llmos_trace_draws_the_same_tree_without_a_collector(plain: Fleet) -> None:
    parent, trace, outer = new_parent(flags="00")
    request = ask(plain, parent)

    def spans() -> list[dict]:  # type: ignore[type-arg]
        done = plain.cli("trace", request, "--json")
        found = json.loads(done.stdout) if done.returncode == 0 else []
        return found if {span["name"] for span in found} >= EXPECTED else []

    found = wait_for(spans, "the ring to hold the whole trace")
    assert {span["trace_id"] for span in found} == {trace}
    assert {span["service"] for span in found} == {"gateway", "scheduler", "worker"}
    edges = {span["span_id"]: span["parent_span_id"] for span in found}
    assert_tree(edges, {span["span_id"]: span["name"] for span in found}, outer)
    drawn = plain.cli("trace", request)
    assert drawn.returncode == 0
    assert all(name in drawn.stdout for name in EXPECTED)
    assert "Hello" not in plain.cli("trace", trace, "--json").stdout


def test_an_unknown_request_says_so(plain: Fleet) -> None:
    done = plain.cli("trace", "no-such-request")
    assert done.returncode == 1
    assert "no-such-request" in done.stderr

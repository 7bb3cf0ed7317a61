"""etcd is gone in the middle of traffic: no request fails, all finish, membership is right once it is back."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import httpx

from tests.fakes.fleet import Fleet, echo_fleet, wait_for

OUTAGE_S = float(os.environ.get("LLMOS_TEST_ETCD_OUTAGE_S", "12"))
"""`make faults` sets 60; the lease of every record is 5 s, so that 12 s already outlive it twice."""


class Traffic:
    """One thread that asks without pause; keeps every failure and every text."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        self._url = f"{fleet.http}/v1/chat/completions"
        self._number = number
        self._stop = threading.Event()
        self.failures: list[str] = []
        self.answers = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        body = {
            "model": "echo",
            "messages": [{"role": "user", "content": f"{self._number}"}],
            "max_tokens": 50,
            "seed": 1,
        }
        expected = None
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                answer = client.post(self._url, json=body)
                text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else None
                expected = expected or text
                if text is None or text != expected:
                    self.failures.append(f"{answer.status_code}: {answer.text[:300]}")
                self.answers += 1

    def finish(self) -> None:
        self._stop.set()
        self._thread.join(90)
        assert not self._thread.is_alive()


def long_stream(fleet: Fleet, tokens: int, result: list[str]) -> threading.Thread:
    """A stream that begins before the outage and ends after it."""

    def run() -> None:
        body = {
            "model": "echo",
            "messages": [{"role": "user", "content": "long"}],
            "max_tokens": tokens,
            "stream": True,
        }
        with httpx.stream("POST", f"{fleet.http}/v1/chat/completions", json=body, timeout=120) as answer:
            result.append(answer.read().decode())

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_serving_outlives_etcd(tmp_path: Path) -> None:
    with echo_fleet(tmp_path, workers=2, worker=("--echo-tokens-per-second", "100")) as fleet:
        wait_for(lambda: [w["state"] for w in fleet.workers().values()] == ["ready"] * 2, "both workers")
        before = set(fleet.workers())
        traffic = [Traffic(fleet, number) for number in range(3)]
        wait_for(lambda: all(t.answers for t in traffic), "traffic to flow")
        streamed: list[str] = []
        stream = long_stream(fleet, int((OUTAGE_S + 4) * 100), streamed)
        fleet.etcd.stop()
        gone_at = time.monotonic()
        counted = [t.answers for t in traffic]
        wait_for(lambda: time.monotonic() - gone_at >= OUTAGE_S, "the outage to last", timeout_s=OUTAGE_S + 5)
        assert all(t.answers > count + OUTAGE_S / 2 for t, count in zip(traffic, counted, strict=True))
        fleet.etcd.start()
        joined = fleet.worker("--backend", "echo", "--echo-tokens-per-second", "100")
        wait_for(
            lambda: {i for i, w in fleet.workers().items() if w["state"] == "ready"} == before | {joined.id},
            "membership to be right again",
            timeout_s=10,
        )
        stream.join(60)
        for one in traffic:
            one.finish()
        assert [failure for one in traffic for failure in one.failures] == []
        assert streamed
        assert streamed[0].rstrip().endswith("[DONE]")
        assert '"error"' not in streamed[0]
        listed = fleet.etcd.ctl("get", "--prefix", "/llmos/v1/workers/", "--keys-only")
        assert {line.rsplit("/", 1)[1] for line in listed.split()} == before | {joined.id}

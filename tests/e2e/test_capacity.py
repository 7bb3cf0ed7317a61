"""Capacity in etcd steers dispatch: recorded devices of 24 GB and 80 GB, a model that needs 40 GB."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fakes.fleet import Fleet, running_fleet, wait_for

RECORDINGS = Path(__file__).parents[1] / "fakes" / "recordings"
TTL_S = 3


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with running_fleet(tmp_path) as fleet:
        fleet.scheduler()
        yield fleet


def add_worker(fleet: Fleet, recording: str) -> str:
    flags = ("--backend", "echo", "--lease-ttl-s", str(TTL_S), "--probe-recording", str(RECORDINGS / recording))
    return fleet.worker(*flags, model="small,big=40GiB").id


def records(fleet: Fleet) -> dict[str, dict]:  # type: ignore[type-arg]
    """What etcdctl shows below /llmos/, by key."""
    shown = fleet.etcd.ctl("get", "--prefix", "/llmos/", "-w", "json")
    pairs = json.loads(shown).get("kvs", [])
    return {base64.b64decode(kv["key"]).decode(): json.loads(base64.b64decode(kv["value"])) for kv in pairs}


def ask(fleet: Fleet, model: str) -> None:
    body = {"model": model, "prompt": "x", "max_tokens": 2}
    answer = httpx.post(f"{fleet.http}/v1/completions", json=body, timeout=20)
    assert answer.status_code == 200, answer.text


def test_a_model_of_40_gb_never_lands_on_24_gb(fleet: Fleet) -> None:
    small, large = add_worker(fleet, "gpu-24gb.json"), add_worker(fleet, "gpu-80gb.json")
    fleet.gateway()
    fleet.wait_ready(models=2)
    wait_for(lambda: fleet.workers()[large]["state"] == "ready", "the large worker")
    wait_for(lambda: fleet.workers()[small]["state"] == "ready", "the small worker")
    for _ in range(8):
        ask(fleet, "big")
        ask(fleet, "small")
    states = {
        name: {model["name"]: model["state"] for model in fleet.workers()[worker]["models"]}
        for name, worker in (("small", small), ("large", large))
    }
    assert states["large"] == {"small": "loaded", "big": "loaded"}
    assert states["small"]["big"] in ("unfit", "available")
    assert states["small"]["small"] == "loaded"


def test_alone_the_small_worker_serves_what_fits_and_refuses_the_rest(fleet: Fleet) -> None:
    add_worker(fleet, "gpu-24gb.json")
    fleet.gateway()
    fleet.wait_ready(models=1)
    ask(fleet, "small")
    body = {"model": "big", "prompt": "x", "max_tokens": 2}
    answer = httpx.post(f"{fleet.http}/v1/completions", json=body, timeout=20)
    assert answer.status_code in (404, 503)
    assert answer.json()["error"]["message"]


def test_etcdctl_shows_totals_and_a_killed_worker_is_gone_within_its_ttl(fleet: Fleet) -> None:
    kept, killed = add_worker(fleet, "gpu-24gb.json"), add_worker(fleet, "gpu-80gb.json")
    key = f"/llmos/v1/workers/{killed}"
    shown = records(fleet)
    totals = shown[f"/llmos/v1/workers/{kept}"]["capacity"]
    assert any(int(device["memory_bytes"]) // 10**9 in range(24, 27) for device in totals["devices"])
    assert int(totals["memory_bytes"]) > 0
    assert int(totals["disk_bytes"]) > 0
    assert float(totals["cpu_cores"]) > 0
    next(process for process in fleet.processes if process.id == killed).kill()
    wait_for(lambda: key not in records(fleet), "the killed worker's record to go", timeout_s=TTL_S + 1)
    assert f"/llmos/v1/workers/{kept}" in records(fleet)

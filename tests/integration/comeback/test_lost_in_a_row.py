"""The leader is killed and then the gateway, or the other way round: clients go on where they were, elsewhere."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path

import httpx
import pytest

from tests.fakes.comeback import Reader
from tests.fakes.fleet import Fleet, Process, running_fleet, wait_for

BODIES = [
    {
        "model": "echo",
        "prompt": f"story {seed}",
        "max_tokens": 120,
        "seed": seed,
        "n": 1 + seed % 2,
        "logprobs": seed % 3,
    }
    for seed in range(4)
]


def leader(fleet: Fleet) -> Process | None:
    shown = fleet.etcd.ctl("get", "/llmos/v1/leader", "--print-value-only")
    leading = json.loads(shown)["scheduler_id"] if shown.strip() else ""
    return next((one for one in fleet.processes if one.id == leading and one.popen.poll() is None), None)


def url(gateway: Process) -> str:
    return f"http://127.0.0.1:{gateway.ready['http_port']}"


def start(fleet: Fleet, key_file: Path) -> list[Process]:
    """Two of each but the worker; the gateways."""
    with fleet.together():
        for _ in range(2):
            fleet.scheduler("--lease-ttl-s", "2")
        fleet.worker("--backend", "echo", "--echo-tokens-per-second", "60")
        gateways = [fleet.gateway("--stream-key-file", str(key_file)) for _ in range(2)]
    fleet.wait_ready()
    return gateways


@pytest.mark.long
@pytest.mark.timeout(100)
async def test_a_gateway_and_the_leader_in_a_row(tmp_path: Path) -> None:
    key_file = tmp_path / "gateways.key"
    key_file.write_text(secrets.token_hex(32))
    with running_fleet(tmp_path) as fleet:
        gateways = await asyncio.to_thread(start, fleet, key_file)
        async with httpx.AsyncClient(timeout=60, verify=False) as http:
            readers = [Reader(body) for body in BODIES]
            reading = [asyncio.create_task(reader.begin(http, url(gateways[0]))) for reader in readers]
            await asyncio.gather(*(reader.reached(20) for reader in readers))
            first = leader(fleet)
            assert first is not None
            gateways[0].kill()
            first.kill()
            await asyncio.gather(*reading, return_exceptions=True)
            await asyncio.to_thread(wait_for, lambda: leader(fleet) not in (None, first), "another leader")
            statuses = await asyncio.gather(*(reader.come_back(http, url(gateways[1])) for reader in readers))
            undisturbed = [Reader(body) for body in BODIES]
            await asyncio.gather(*(reader.begin(http, url(gateways[1])) for reader in undisturbed))
        assert statuses == [200] * len(readers), [reader.error for reader in readers]
        assert [reader.whole for reader in readers] == [reader.whole for reader in undisturbed]

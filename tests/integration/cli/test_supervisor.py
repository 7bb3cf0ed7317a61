"""The supervisor with real processes that stand in for the services."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmos.errors import ConfigError, Conflict, SetupError
from llmos.fleet import launch
from llmos.fleet.etcd_server import free_ports
from llmos.fleet.identity import ProcessIdentity, descendants, identify, is_alive, send_signal, wait_gone
from llmos.fleet.options import FleetOptions
from llmos.fleet.state import FleetState, Role, read_state
from llmos.fleet.supervisor import Supervisor, edge_port
from tests.fakes import scripted_service
from tests.fakes.fleet import wait_for

SHORT_GRACE: dict[Role, float] = {"gateway": 0.3, "worker": 0.3, "scheduler": 0.3, "etcd": 3.0}


@dataclass
class ScriptPlan:
    """Every service is a script; `worker` says how workers behave."""

    data_dir: Path
    behaviour: str = "serve"

    def scheduler(self, name: str, etcd: Sequence[str]) -> list[str]:
        return self._script("serve", name)

    def worker(self, name: str, etcd: Sequence[str]) -> list[str]:
        return self._script(self.behaviour, name)

    def gateway(self, name: str, schedulers: Sequence[str], http_port: int, grpc_port: int) -> list[str]:
        return self._script("serve", name)

    def _script(self, behaviour: str, name: str) -> list[str]:
        return [sys.executable, scripted_service.__file__, behaviour, str(self.data_dir / "ready" / f"{name}.json")]


class RunningFleet:
    """A supervisor in a task: `up` returns once it is ready."""

    def __init__(self, data_dir: Path, behaviour: str = "serve", **options: object) -> None:
        settings = {"etcd": ("127.0.0.1:1",), "model": "m", "http_port": 0, "grpc_port": 0, **options}
        self.options = FleetOptions(data_dir=data_dir, **settings)  # type: ignore[arg-type]
        self.steps: list[str] = []
        self.stop = asyncio.Event()
        self._ready: asyncio.Future[FleetState] = asyncio.get_running_loop().create_future()
        plan = ScriptPlan(data_dir, behaviour)
        self._supervisor = Supervisor(self.options, plan, self.steps.append, SHORT_GRACE)
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        await self._supervisor.run(self.stop, self._on_ready)

    async def up(self) -> FleetState:
        self.task = asyncio.create_task(self.run())
        either: set[asyncio.Future[Any]] = {self.task, self._ready}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            await self.task
        return self._ready.result()

    async def down(self) -> None:
        assert self.task is not None
        self.stop.set()
        await self.task

    async def _on_ready(self, state: FleetState) -> None:
        self._ready.set_result(state)


def alive(state: FleetState) -> list[str]:
    return [member.name for member in state.members if is_alive(member.process)]


async def test_up_serves_and_down_leaves_nothing(tmp_path: Path) -> None:
    fleet = RunningFleet(tmp_path, workers=2)
    state = await fleet.up()
    assert alive(state) == ["scheduler-1", "worker-1", "worker-2", "gateway-1"]
    assert read_state(tmp_path) == state
    assert state.phase == "ready"
    assert state.http_url == f"http://127.0.0.1:{state.members[-1].ports['http_port']}"
    await fleet.down()
    assert alive(state) == []
    assert read_state(tmp_path) is None
    assert fleet.steps == ["starting schedulers", "starting workers and gateways", "loading models"]


async def test_a_service_that_fails_names_its_reason_and_its_log(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"worker-1 stopped.*exit status 3.*no such model.*worker-1\.log"):
        await RunningFleet(tmp_path, "fail").up()
    state = read_state(tmp_path)
    assert state is not None
    assert (state.phase, state.members) == ("failed", ())
    assert "no such model" in state.error


async def test_a_service_that_never_becomes_ready(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="not ready after 4 s while starting workers"):
        await RunningFleet(tmp_path, "silent", start_timeout_s=4.0).up()
    assert descendants_of_this_process() == []


async def test_a_dead_worker_does_not_stop_the_fleet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fleet = RunningFleet(tmp_path, workers=2)
    state = await fleet.up()
    victim = state.members[1].process
    assert send_signal(victim, signal.SIGKILL)
    await asyncio.to_thread(wait_for, lambda: "worker-1 ended" in caplog.text, "the warning")
    assert fleet.task is not None
    assert not fleet.task.done()
    assert alive(state) == ["scheduler-1", "worker-2", "gateway-1"]
    await fleet.down()


async def test_one_that_ignores_sigterm_dies_with_its_children(tmp_path: Path) -> None:
    fleet = RunningFleet(tmp_path, "deaf")
    state = await fleet.up()
    worker = next(member.process for member in state.members if member.role == "worker")
    family = [worker, *descendants(worker)]
    assert len(family) == 2
    await fleet.down()
    assert not any(is_alive(process) for process in family)


async def test_a_second_fleet_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    fleet = RunningFleet(tmp_path)
    state = await fleet.up()
    with pytest.raises(Conflict, match="already runs"):
        await RunningFleet(tmp_path).up()
    assert read_state(tmp_path) == state
    await fleet.down()


async def test_what_a_dead_supervisor_left_is_forgotten(tmp_path: Path) -> None:
    with pytest.raises(SetupError):
        await RunningFleet(tmp_path, "fail").up()
    fleet = RunningFleet(tmp_path)
    assert (await fleet.up()).phase == "ready"
    await fleet.down()


async def test_stop_while_starting(tmp_path: Path) -> None:
    fleet = RunningFleet(tmp_path, "silent")
    task = asyncio.create_task(fleet.run())
    await asyncio.to_thread(wait_for, lambda: "starting workers and gateways" in fleet.steps, "the workers' start")
    fleet.stop.set()
    await task
    assert read_state(tmp_path) is None
    assert descendants_of_this_process() == []


async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    fleet = RunningFleet(tmp_path)
    taken = (await fleet.up()).members[0].ports["port"]
    with pytest.raises(ConfigError, match=f"port {taken} .* is taken: choose another with --http-port"):
        await RunningFleet(tmp_path / "second", http_port=taken).up()
    await fleet.down()


async def test_the_embedded_etcd_keeps_its_data_and_forgets_members(tmp_path: Path) -> None:
    fleet = RunningFleet(tmp_path, etcd=())
    first = await fleet.up()
    for key in ("/llmos/v1/workers/w", "/llmos/v1/leader/7", "/llmos/v1/models/m"):
        etcdctl(first, "put", key, "kept")
    await fleet.down()
    again = RunningFleet(tmp_path, etcd=())
    second = await again.up()
    assert etcdctl(second, "get", "--prefix", "/llmos/", "--keys-only").split() == ["/llmos/v1/models/m"]
    await again.down()
    assert alive(second) == []


def test_a_launched_program_dies_with_its_parent() -> None:
    script = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, {launch.__file__!r}, str(os.getpid()), 'sleep', '600'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = identify(int(parent.stdout.readline()))
    assert child is not None
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    assert wait_gone([child], 10) == []


def test_a_program_that_cannot_be_run(tmp_path: Path) -> None:
    parent = str(identify_me().pid)
    command = [sys.executable, launch.__file__, parent, str(tmp_path / "missing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == launch.NOT_STARTED
    assert "cannot run" in done.stderr


def test_a_default_port_gives_way_and_a_given_one_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        assert edge_port(None, taken, "--http-port") == 0
        with pytest.raises(ConfigError, match="--http-port"):
            edge_port(taken, 1, "--http-port")
    assert edge_port(None, taken, "--http-port") == taken
    assert edge_port(0, taken, "--http-port") == 0


def test_free_ports_differ() -> None:
    assert len(set(free_ports(4))) == 4


def identify_me() -> ProcessIdentity:
    found = identify(os.getpid())
    assert found is not None
    return found


def descendants_of_this_process() -> list[ProcessIdentity]:
    return descendants(identify_me())


def etcdctl(state: FleetState, *arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "etcdctl"), "--endpoints", state.etcd_endpoints[0], *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout

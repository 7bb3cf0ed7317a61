"""The supervisor with real processes that stand in for the services."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from llmos.errors import ConfigError, Conflict, NotFound, SetupError
from llmos.fleet import launch
from llmos.fleet.etcd_server import free_ports
from llmos.fleet.identity import ProcessIdentity, descendants, identify, is_alive, send_signal, wait_gone
from llmos.fleet.keeper import Care
from llmos.fleet.member import RunningMember
from llmos.fleet.options import FleetOptions
from llmos.fleet.probe import http_status
from llmos.fleet.restarts import RestartPolicy
from llmos.fleet.rolling import RestartOrder, give_order
from llmos.fleet.state import FleetState, Member, Restart, Role, read_state
from llmos.fleet.supervisor import Supervisor, edge_port
from tests.fakes import scripted_service
from tests.fakes.fleet import wait_for

SHORT_GRACE: dict[Role, float] = {"gateway": 0.3, "worker": 0.3, "scheduler": 0.3, "etcd": 3.0}


@dataclass
class ScriptPlan:
    """Every service is a script; `worker` says how workers behave."""

    data_dir: Path
    behaviour: str = "serve"

    def scheduler(self, name: str, etcd: Sequence[str], port: int) -> list[str]:
        return self._script("serve", name, str(port))

    def worker(self, name: str, etcd: Sequence[str]) -> list[str]:
        return self._script(self.behaviour, name)

    def gateway(self, name: str, schedulers: Sequence[str], http_fd: int, grpc_port: int) -> list[str]:
        return self._script("serve", name, f"fd:{http_fd}")

    def _script(self, behaviour: str, name: str, where: str = "0") -> list[str]:
        ready_file = self.data_dir / "ready" / f"{name}.json"
        return [sys.executable, scripted_service.__file__, behaviour, str(ready_file), where]


class HttpEyes:
    """Scripts answer HTTP only."""

    async def alive(self, member: RunningMember, timeout_s: float) -> bool:
        url = f"http://127.0.0.1:{member.ports['port']}/"
        return await asyncio.to_thread(http_status, url, timeout_s) == 200

    async def standing(self, member: RunningMember) -> frozenset[str]:
        return frozenset()

    async def settled(self, member: RunningMember, before: frozenset[str] | None) -> None:
        return None


QUICK = Care(
    probe_every_s=0.05,
    probe_timeout_s=0.5,
    misses=2,
    hung_grace_s=0.1,
    start_s=10.0,
    restarts=RestartPolicy(first_pause_s=0.05, longest_pause_s=0.1, limit=3),
)


class RunningFleet:
    """A supervisor in a task: `up` returns once it is ready."""

    def __init__(self, data_dir: Path, behaviour: str = "serve", **options: object) -> None:
        settings = {"etcd": ("127.0.0.1:1",), "model": "m", "http_port": 0, "grpc_port": 0, **options}
        self.options = FleetOptions(data_dir=data_dir, **settings)  # type: ignore[arg-type]
        self.steps: list[str] = []
        self.stop = asyncio.Event()
        self._ready: asyncio.Future[FleetState] = asyncio.get_running_loop().create_future()
        plan = ScriptPlan(data_dir, behaviour)
        self.notes: list[str] = []
        self._supervisor = Supervisor(
            self.options,
            plan,
            self.steps.append,
            SHORT_GRACE,
            notify=self.notes.append,
            care=replace(QUICK, start_s=self.options.start_timeout_s),
            eyes=HttpEyes(),
        )
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


def member(data_dir: Path, name: str) -> Member:
    state = read_state(data_dir)
    assert state is not None
    return next(one for one in state.members if one.name == name)


async def until(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_for, condition, what)


async def test_the_dead_are_started_again_on_their_ports_and_it_is_said(tmp_path: Path) -> None:
    fleet = RunningFleet(tmp_path, workers=2)
    state = await fleet.up()
    victims = [one for one in state.members if one.name in ("scheduler-1", "worker-1", "gateway-1")]
    for victim in victims:
        assert send_signal(victim.process, signal.SIGKILL)
    names = {victim.name for victim in victims}
    await until(lambda: all(member(tmp_path, name).restarts == 1 for name in names), "new processes")
    await until(lambda: len(alive(cast("FleetState", read_state(tmp_path)))) == 4, "all to run")
    await until(lambda: all(member(tmp_path, name).status == "running" for name in names), "the new ones to serve")
    assert member(tmp_path, "worker-2").restarts == 0
    for victim in victims:
        again = member(tmp_path, victim.name)
        assert again.process != victim.process
        assert victim.role == "worker" or again.ports["http_port"] == victim.ports["http_port"]
        assert again.said == "was ended by signal 9"
        assert any(note.startswith(f"{victim.name} was ended by signal 9; it is started again") for note in fleet.notes)
        assert f"{victim.name} serves again (restart 1)" in fleet.notes
    await fleet.down()
    assert read_state(tmp_path) is None


async def test_one_that_ends_again_and_again_is_given_up_until_a_person_asks(tmp_path: Path) -> None:
    fleet = RunningFleet(tmp_path, "mortal")
    state = await fleet.up()
    doom = tmp_path / "ready" / "worker-1.doom"
    doom.write_text("7")
    assert send_signal(next(one.process for one in state.members if one.role == "worker"), signal.SIGKILL)
    await until(lambda: member(tmp_path, "worker-1").status == "failed", "the worker to be given up")
    failed = member(tmp_path, "worker-1")
    assert failed.restarts == QUICK.restarts.limit
    assert failed.said == "ended with status 7 (doomed), too often in a row"
    assert "`llmos restart worker-1` tries it again" in fleet.notes[-1]
    assert alive(cast("FleetState", read_state(tmp_path))) == ["scheduler-1", "gateway-1"]
    doom.unlink()
    give_order(tmp_path, state, RestartOrder(id="again", members=("worker-1",), patience_s=1.0))
    await until(lambda: member(tmp_path, "worker-1").status == "running", "the worker to run")
    await fleet.down()


async def test_one_that_answers_no_more_is_ended_and_started_again(tmp_path: Path) -> None:
    fleet = RunningFleet(tmp_path)
    state = await fleet.up()
    frozen = next(one.process for one in state.members if one.role == "worker")
    assert send_signal(frozen, signal.SIGSTOP)
    await until(lambda: member(tmp_path, "worker-1").restarts == 1, "the frozen worker to be replaced")
    assert not is_alive(frozen)
    assert member(tmp_path, "worker-1").said == "did not answer any more and was ended"
    await fleet.down()


async def test_every_member_is_restarted_by_order_one_after_another(tmp_path: Path) -> None:
    fleet = RunningFleet(tmp_path, workers=2)
    state = await fleet.up()
    with pytest.raises(NotFound, match="no member 'worker-9'; it has gateway-1"):
        give_order(tmp_path, state, RestartOrder(id="none", members=("worker-9",), patience_s=1.0))
    give_order(tmp_path, state, RestartOrder(id="all", members=(), patience_s=1.0))

    def over() -> bool:
        now = read_state(tmp_path)
        return now is not None and now.restart is not None and now.restart.over

    await until(over, "the end of the restart")
    after = read_state(tmp_path)
    assert after is not None
    assert after.restart == Restart(id="all", total=4, done=4, over=True)
    assert [(one.restarts, one.status, one.said) for one in after.members] == [(1, "running", "restarted by order")] * 4
    assert not any(is_alive(one.process) for one in state.members)
    assert len(alive(after)) == 4
    await fleet.down()
    assert alive(after) == []


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

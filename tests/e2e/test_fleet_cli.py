"""`llmos up --detach` with echo workers, asked, watched, hurt and stopped by the command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from llmos.fleet.identity import ProcessIdentity, descendants, is_alive, send_signal, wait_gone
from llmos.fleet.state import FleetState, read_state
from llmos.v1 import fleet_pb2, fleet_pb2_grpc
from tests.fakes.fleet import wait_for

NODE_KEYS = [
    "id",
    "role",
    "pid",
    "host",
    "address",
    "backend",
    "models",
    "state",
    "capacity",
    "restarts",
    "detail",
    "uses",
]
REQUEST_KEYS = ["id", "state", "model", "tenant", "class", "worker", "attempt", "tokens_in", "tokens_out", "age_ms"]


@dataclass(frozen=True)
class Shell:
    """Runs the command with a state folder of its own."""

    home: Path

    @property
    def data(self) -> Path:
        return self.home / "data"

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("LLMOS_")}
        return {**kept, "XDG_STATE_HOME": str(self.home)}

    def run(self, *arguments: str, text_in: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llmos.cli.main", *arguments],
            env={**self.environment(), **variables},
            input=text_in,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "llmos.cli.main", *arguments]
        return subprocess.Popen(
            command, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ok(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    def up(self, *flags: str) -> FleetState:
        ports = ("--http-port", "0", "--grpc-port", "0", "--data-dir", str(self.data))
        self.ok("up", "--detach", "--backend", "echo", *ports, *flags)
        state = read_state(self.data)
        assert state is not None
        return state


def family(state: FleetState) -> list[ProcessIdentity]:
    """Every process of the fleet, the engines of its workers included."""
    return [state.supervisor, *descendants(state.supervisor)]


def requests(state: FleetState) -> list[fleet_pb2.RequestInfo]:
    """What waits or runs, asked at once."""
    with grpc.insecure_channel(state.grpc_address) as channel:
        stub: Any = fleet_pb2_grpc.FleetStub(channel)
        return list(stub.ListRequests(fleet_pb2.ListRequestsRequest(), timeout=30).requests)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.run("down", "--data-dir", str(shell.data))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, FleetState]]:
    """One fleet for the tests that leave it whole."""
    shell = Shell(tmp_path_factory.mktemp("fleet"))
    try:
        yield shell, shell.up("--workers", "2", "--echo-tokens-per-second", "50")
    finally:
        shell.run("down", "--data-dir", str(shell.data))


def test_nodes(shared: tuple[Shell, FleetState]) -> None:
    shell, state = shared

    def ready() -> list[dict[str, Any]]:
        nodes = shell.json("nodes")
        return nodes if sum(node["role"] == "worker" and node["state"] == "ready" for node in nodes) == 2 else []

    nodes = wait_for(ready, "two ready workers")
    assert all(list(node) == NODE_KEYS for node in nodes)
    assert sorted(node["role"] for node in nodes) == ["gateway", "scheduler", "worker", "worker"]
    pids = {member.process.pid for member in state.members if member.role != "etcd"}
    assert {node["pid"] for node in nodes} == pids
    worker = next(node for node in nodes if node["role"] == "worker")
    assert worker["backend"] == "echo"
    assert [model["name"] for model in worker["models"]] == ["echo"]
    assert worker["capacity"]["memory_bytes"] > 0


def test_generate_is_repeatable_and_traced(shared: tuple[Shell, FleetState]) -> None:
    shell, _ = shared
    flags = ("--max-tokens", "20", "--seed", "7", "--temperature", "0")
    answer = shell.json("generate", "Hello", *flags)
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["finish_reason"] == "length"
    assert shell.ok("generate", "Hello", *flags) == f"{answer['text']}\n"
    assert shell.ok("generate", "Hello", *flags, "--no-stream") == f"{answer['text']}\n"

    def spans() -> list[dict[str, Any]]:
        done = shell.run("trace", answer["id"], "--json")
        found = json.loads(done.stdout) if done.returncode == 0 else []
        return found if {"gateway", "scheduler", "worker"} <= {span["service"] for span in found} else []

    found = wait_for(spans, "spans of all three services")
    assert len({span["trace_id"] for span in found}) == 1
    drawing = shell.ok("trace", answer["id"])
    assert "chat echo" in drawing
    assert "└─" in drawing


def test_chat_in_a_pipe(shared: tuple[Shell, FleetState]) -> None:
    shell, _ = shared
    done = shell.run("chat", "--max-tokens", "5", "--seed", "1", text_in="one\ntwo\n")
    assert done.returncode == 0, done.stderr
    assert [len(line) for line in done.stdout.splitlines()] == [5, 5]


def test_ps_and_kill(shared: tuple[Shell, FleetState]) -> None:
    shell, _ = shared
    asking = shell.start("generate", "A long story", "--max-tokens", "5000")
    (row,) = wait_for(lambda: [row for row in shell.json("ps") if row["tokens_out"] > 0], "a running request")
    assert list(row) == REQUEST_KEYS
    assert (row["state"], row["model"], row["attempt"]) == ("decode", "echo", 1)
    assert row["worker"] in {node["id"] for node in shell.json("nodes") if node["role"] == "worker"}
    assert shell.ok("kill", row["id"]) == f"killed {row['id']}\n"
    _, err = asking.communicate(timeout=30)
    assert asking.returncode == 1
    assert err.startswith("llmos: ")
    wait_for(lambda: not shell.json("ps"), "the request to be gone")
    assert shell.run("kill", row["id"]).returncode == 1


def test_a_second_up_on_the_same_folder_is_refused(shared: tuple[Shell, FleetState]) -> None:
    shell, state = shared
    done = shell.run("up", "--detach", "--backend", "echo", "--data-dir", str(shell.data))
    assert done.returncode == 1
    assert "already runs" in done.stderr
    assert read_state(shell.data) == state


def test_down_leaves_no_process(shell: Shell) -> None:
    state = shell.up("--workers", "2")
    processes = family(state)
    assert len(processes) >= 1 + len(state.members)
    assert "stopped the fleet" in shell.ok("down", "--data-dir", str(shell.data))
    assert not any(is_alive(process) for process in processes)
    assert shell.ok("down") == "no fleet is running\n"
    assert "start one with `llmos up`" in shell.run("nodes").stderr


def test_a_fleet_dies_with_its_supervisor(shell: Shell) -> None:
    state = shell.up("--workers", "2")
    processes = family(state)
    send_signal(state.supervisor, signal.SIGKILL)
    assert wait_gone(processes, 20) == []
    assert shell.run("ps").returncode == 1
    again = shell.up()
    assert again.phase == "ready"


def test_a_stream_outlives_its_worker(shell: Shell) -> None:
    state = shell.up("--workers", "2", "--echo-tokens-per-second", "20")
    flags = ("--max-tokens", "60", "--seed", "3", "--data-dir", str(shell.data))
    whole = shell.ok("generate", "Hello", *flags)
    asking = shell.start("generate", "Hello", *flags)
    # Not by the command, which may take longer to start than the stream takes to end.
    (row,) = wait_for(lambda: [row for row in requests(state) if row.tokens_out > 0], "a running request")
    victim = next(member for member in state.members if member.id == row.worker)
    send_signal(victim.process, signal.SIGKILL)
    out, err = asking.communicate(timeout=60)
    assert asking.returncode == 0, err
    assert out == whole

    def another_in_its_place() -> bool:
        workers = [node for node in shell.json("nodes") if node["role"] == "worker" and node["state"] == "ready"]
        return sorted(node["restarts"] for node in workers) == [0, 1] and victim.id not in {w["id"] for w in workers}

    wait_for(another_in_its_place, "another worker in the place of the dead one")
    log = (shell.data / "logs" / "supervisor.log").read_text()
    assert f"{victim.name} was ended by signal 9; it is started again" in log
    assert f"{victim.name} serves again" in log


def test_the_fleet_outlives_its_first_gateway_and_its_leader(shell: Shell) -> None:
    state = shell.up("--schedulers", "2", "--gateways", "2")
    flags = ("--max-tokens", "10", "--seed", "3", "--data-dir", str(shell.data))
    whole = shell.ok("generate", "Hello", *flags)
    standing = {node["state"]: node for node in shell.json("nodes") if node["role"] == "scheduler"}
    assert set(standing) == {"ready", "standby"}
    for victim in (standing["ready"]["pid"], next(m.process.pid for m in state.members if m.name == "gateway-1")):
        os.kill(victim, signal.SIGKILL)
    assert shell.ok("generate", "Hello", *flags) == whole

    def all_again() -> bool:
        nodes = [node for node in shell.json("nodes") if node["role"] != "worker"]
        return sorted((node["role"], node["restarts"]) for node in nodes) == [
            ("gateway", 0),
            ("gateway", 1),
            ("scheduler", 0),
            ("scheduler", 1),
        ]

    wait_for(all_again, "new processes in the place of the dead")


def test_once_answers_and_leaves_nothing(shell: Shell) -> None:
    keys = str(shell.home / "keys.json")
    key = shell.ok("keys", "add", "--tenant", "me", "--file", keys).strip()
    places = ("--http-port", "0", "--grpc-port", "0", "--data-dir", str(shell.data), "--keys-file", keys)
    command = ("up", "--backend", "echo", *places, "--prompt", "Hello", "--once", "--max-tokens", "12")
    refused = shell.run(*command)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.splitlines()[-1].startswith("llmos: ")
    done = shell.run(*command, LLMOS_API_KEY=key)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 13
    assert read_state(shell.data) is None
    pids = [json.loads(path.read_text())["pid"] for path in (shell.data / "ready").iterdir()]
    assert len(pids) == 3
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_in_the_foreground_it_serves_until_a_signal(shell: Shell) -> None:
    ports = ("--http-port", "0", "--grpc-port", "0", "--data-dir", str(shell.data))
    process = shell.start("up", "--backend", "echo", *ports)
    state = wait_for(lambda: (found := read_state(shell.data)) and found.phase == "ready" and found, "the fleet", 60)
    assert isinstance(state, FleetState)
    with urllib.request.urlopen(f"{state.http_url}/v1/models", timeout=10) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["echo"]
    processes = family(state)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r"curl http://127\.0\.0\.1:\d+/v1/chat/completions", err)
    assert "from openai import OpenAI" in err
    assert not any(is_alive(member) for member in processes)


def test_a_signal_before_the_answer_is_no_success(shell: Shell) -> None:
    places = ("--http-port", "0", "--grpc-port", "0", "--data-dir", str(shell.data))
    slow = ("--echo-tokens-per-second", "1", "--max-tokens", "500")
    process = shell.start("up", "--backend", "echo", *places, *slow, "--prompt", "Hello", "--once")
    state = wait_for(lambda: (found := read_state(shell.data)) and found.phase == "ready" and found, "the fleet", 60)
    assert isinstance(state, FleetState)
    processes = family(state)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not any(is_alive(member) for member in processes)


def test_a_fleet_that_is_not_ready_in_time_names_its_log(shell: Shell) -> None:
    done = shell.run("up", "--detach", "--backend", "echo", "--start-timeout", "1", "--data-dir", str(shell.data))
    assert done.returncode == 1
    assert str(shell.data / "logs") in done.stderr
    assert shell.run("nodes").returncode == 1


def test_an_etcd_that_does_not_answer_is_named_at_once(shell: Shell) -> None:
    done = shell.run("up", "--detach", "--backend", "echo", "--etcd", "127.0.0.1:1", "--data-dir", str(shell.data))
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr
    assert shell.run("nodes").returncode == 1

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmos.cli.connection import find_target
from llmos.errors import ConfigError, Conflict, Unavailable
from llmos.fleet.identity import ProcessIdentity, identify, is_alive
from llmos.fleet.lock import FleetLock
from llmos.fleet.shutdown import stop_fleet
from llmos.fleet.state import (
    FleetState,
    Member,
    Phase,
    last_up,
    read_state,
    remember_last_up,
    remove_state,
    state_home,
    write_state,
)

NOBODY = ProcessIdentity(2**22 + 5, "never/0")


def me() -> ProcessIdentity:
    found = identify(os.getpid())
    assert found is not None
    return found


def running(phase: Phase = "ready", grpc_address: str = "127.0.0.1:7") -> FleetState:
    return FleetState(phase=phase, supervisor=me(), grpc_address=grpc_address)


def test_state_round_trip(tmp_path: Path) -> None:
    member = Member(name="worker-1", role="worker", process=NOBODY, log="l", id="w", ports={"port": 3})
    state = FleetState(phase="ready", supervisor=me(), members=(member,), models=("m",), etcd_endpoints=("a:1",))
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == ["fleet.json"]
    remove_state(tmp_path)
    remove_state(tmp_path)
    assert read_state(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"phase": "asleep"}'])
def test_a_state_file_of_another_kind_is_no_fleet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fleet.json").write_bytes(content)
    assert read_state(tmp_path) is None


def test_a_pid_with_another_birth_is_another_process() -> None:
    assert is_alive(me())
    assert not is_alive(ProcessIdentity(os.getpid(), "some/1"))
    assert not is_alive(NOBODY)


def test_stopping_a_stale_fleet_signals_nobody(tmp_path: Path) -> None:
    stranger = ProcessIdentity(os.getpid(), "some/1")
    write_state(tmp_path, FleetState(phase="ready", supervisor=stranger))
    assert not stop_fleet(tmp_path, report=lambda step: None)
    assert read_state(tmp_path) is None


def test_one_fleet_per_folder(tmp_path: Path) -> None:
    with FleetLock(tmp_path), pytest.raises(Conflict, match="already runs"), FleetLock(tmp_path):
        raise AssertionError("two fleets in one folder")
    with FleetLock(tmp_path):
        pass


def test_state_home_follows_the_environment() -> None:
    assert state_home({"XDG_STATE_HOME": "/x"}) == Path("/x/llmos")
    assert state_home({}) == Path.home() / ".local" / "state" / "llmos"


def test_the_named_folder_comes_first(tmp_path: Path) -> None:
    write_state(tmp_path, running())
    target = find_target(tmp_path, {"LLMOS_ADDRESS": "elsewhere:1", "LLMOS_API_KEY": "k"})
    assert (target.address, target.api_key) == ("127.0.0.1:7", "k")


def test_the_address_comes_before_the_last_up(tmp_path: Path) -> None:
    remember_last_up(tmp_path / "llmos", tmp_path)
    write_state(tmp_path, running())
    target = find_target(None, {"XDG_STATE_HOME": str(tmp_path), "LLMOS_ADDRESS": "h:1", "LLMOS_CA_FILE": "/ca"})
    assert (target.address, target.tls.ca_file) == ("h:1", Path("/ca"))


def test_the_last_up_is_found(tmp_path: Path) -> None:
    remember_last_up(tmp_path / "llmos", tmp_path)
    write_state(tmp_path, running())
    assert last_up(tmp_path / "llmos") == tmp_path
    assert find_target(None, {"XDG_STATE_HOME": str(tmp_path)}).address == "127.0.0.1:7"


def test_no_fleet_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="start one with `llmos up`"):
        find_target(None, {"XDG_STATE_HOME": str(tmp_path)})
    write_state(tmp_path, FleetState(phase="ready", supervisor=NOBODY, grpc_address="127.0.0.1:7"))
    with pytest.raises(Unavailable, match="no fleet is running in"):
        find_target(tmp_path, {})


def test_a_fleet_that_still_starts_says_so(tmp_path: Path) -> None:
    write_state(tmp_path, running(phase="starting", grpc_address=""))
    with pytest.raises(Unavailable, match="not ready yet"):
        find_target(tmp_path, {})


def test_an_address_without_port_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        find_target(None, {"LLMOS_ADDRESS": "somewhere"})


def test_a_key_from_a_file_may_end_its_line_but_not_hold_two() -> None:
    assert find_target(None, {"LLMOS_ADDRESS": "h:1", "LLMOS_API_KEY": "k\n"}).api_key == "k"
    with pytest.raises(ConfigError, match="llmos keys add"):
        find_target(None, {"LLMOS_ADDRESS": "h:1", "LLMOS_API_KEY": "a\nb"})

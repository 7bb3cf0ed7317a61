"""End a fleet from outside, by its state file: the supervisor first, then whatever is left of it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from llmos.errors import SetupError
from llmos.fleet.identity import ProcessIdentity, descendants, is_alive, send_signal, wait_gone
from llmos.fleet.state import FleetState, read_state, remove_state

STOP_TIMEOUT_S = 60.0
_KILL_WAIT_S = 10.0


def is_running(state: FleetState) -> bool:
    """Whether the fleet's supervisor lives."""
    return is_alive(state.supervisor)


def stop_fleet(data_dir: Path, report: Callable[[str], None], timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Stop the fleet of this folder and leave no process of it. False if none was running; idempotent."""
    state = read_state(data_dir)
    if state is None:
        return False
    was_running = is_running(state)
    family = _family(state)
    if was_running:
        report("stopping the fleet")
    if send_signal(state.supervisor, signal.SIGTERM):
        wait_gone([state.supervisor], timeout_s)
    _kill(family)
    remove_state(data_dir)
    return was_running


def clear_stale(data_dir: Path) -> None:
    """Kill what a dead supervisor may have left and forget it. The caller holds the folder's lock."""
    state = read_state(data_dir)
    if state is not None and not is_running(state):
        _kill(_family(state))
        remove_state(data_dir)


def _family(state: FleetState) -> list[ProcessIdentity]:
    members = [state.supervisor, *(member.process for member in state.members)]
    return [*members, *(child for member in members for child in descendants(member))]


def _kill(processes: list[ProcessIdentity]) -> None:
    for process in processes:
        send_signal(process, signal.SIGKILL)
    left = wait_gone(processes, _KILL_WAIT_S)
    if left:
        raise SetupError(f"processes {', '.join(str(process.pid) for process in left)} of the fleet do not end")

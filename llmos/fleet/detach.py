"""A fleet in the background: its supervisor runs in a session of its own, the command waits until it serves."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from llmos.errors import SetupError
from llmos.fleet.identity import ProcessIdentity, identify
from llmos.fleet.options import FleetOptions
from llmos.fleet.state import FleetState, read_state

_POLL_S = 0.1
_STOP_WAIT_S = 60.0
_SLACK_S = 30.0


def encode_options(options: FleetOptions) -> str:
    """Options as the detached supervisor's one argument."""
    return msgspec.json.encode(options, enc_hook=str).decode()


def decode_options(text: str) -> FleetOptions:
    """What `encode_options` wrote."""
    return msgspec.json.decode(text, type=FleetOptions, dec_hook=lambda kind, value: kind(value))


def start_detached(options: FleetOptions, report: Callable[[str], None]) -> FleetState:
    """Start a supervisor that outlives us; returns its state once the fleet is ready.

    Raises SetupError, naming the log, if it ends or is not ready in time; no process is left then.
    """
    log = options.log_dir / "supervisor.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llmos.fleet", encode_options(options)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        return _wait_ready(process, options, report, log)
    except BaseException:
        _end(process)
        raise


def _wait_ready(
    process: subprocess.Popen[bytes], options: FleetOptions, report: Callable[[str], None], log: Path
) -> FleetState:
    deadline = time.monotonic() + options.start_timeout_s + _SLACK_S
    me = identify(process.pid)
    step = ""
    while time.monotonic() < deadline:
        state = _state_of(me, options.data_dir)
        if state is not None and state.phase == "ready":
            return state
        if process.poll() is not None:
            raise SetupError(_failure(me, options.data_dir, log))
        if state is not None and state.step not in ("", step):
            step = state.step
            report(step)
        time.sleep(_POLL_S)
    raise SetupError(f"the fleet was not ready in time (log: {log})")


def _state_of(supervisor: ProcessIdentity | None, data_dir: Path) -> FleetState | None:
    state = read_state(data_dir)
    return state if state is not None and state.supervisor == supervisor else None


def _failure(supervisor: ProcessIdentity | None, data_dir: Path, log: Path) -> str:
    state = _state_of(supervisor, data_dir)
    if state is not None and state.error:
        return state.error if str(log.parent) in state.error else f"{state.error} (log: {log})"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"the fleet's supervisor ended: {lines[-1] if lines else 'it said nothing'} (log: {log})"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_WAIT_S)
            return
        process.kill()
    process.wait(_STOP_WAIT_S)

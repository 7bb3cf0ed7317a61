"""`llmos restart`: put fresh processes in the place of running ones, while the fleet serves."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Annotated

import typer

from llmos.cli import output
from llmos.cli.completion import member_names
from llmos.cli.flags import AsJson, DataDir

if TYPE_CHECKING:
    from pathlib import Path

    from llmos.fleet.state import FleetState, Restart

_POLL_S = 0.1
_TAKEN_UP_S = 30.0
"""A supervisor that has not begun by then does not hear."""

Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME]...", help="Members, as in `logs/NAME.log`: worker-1, ...", autocompletion=member_names
    ),
]
Rolling = Annotated[bool, typer.Option("--rolling", help="Restart every process, one after another.")]
Drain = Annotated[float, typer.Option("--drain", min=0.0, help="Most seconds that a gateway lets its streams end.")]
Patience = Annotated[float, typer.Option("--timeout", min=0.1, help="Most seconds to wait for the end.")]


def restart(
    names: Names = None,
    rolling: Rolling = False,
    drain_s: Drain = 600.0,
    timeout_s: Patience = 3600.0,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Restart members of a fleet that `llmos up` started, without an error for its clients.

    A worker's streams move to others, a standby takes a scheduler's place, and a gateway goes when its successor serves
    and its own streams have ended. One that was given up after too many crashes is tried again.
    """
    if bool(names) == rolling:
        raise typer.BadParameter("name the members to restart, or give --rolling for all of them")
    folder = _folder(data_dir)
    steps = output.Steps()
    try:
        done = _restart(folder, tuple(names or ()), drain_s, timeout_s, steps)
    finally:
        steps.done()
    if as_json:
        output.print_json({"restarted": done.done, "total": done.total})
    else:
        output.write(f"restarted {done.done} of {done.total} processes\n")


def _folder(data_dir: Path | None) -> Path:
    from llmos.config import environment
    from llmos.errors import Unavailable
    from llmos.fleet.state import last_up, state_home

    folder = data_dir or last_up(state_home(environment()))
    if folder is None:
        raise Unavailable("no fleet is running: start one with `llmos up`")
    return folder


def _running(folder: Path) -> FleetState:
    from llmos.errors import Unavailable
    from llmos.fleet.shutdown import is_running
    from llmos.fleet.state import read_state

    state = read_state(folder)
    if state is None or state.phase != "ready" or not is_running(state):
        raise Unavailable(f"no fleet serves in {folder}: only one that `llmos up` started can be restarted like this")
    return state


def _restart(folder: Path, names: tuple[str, ...], drain_s: float, timeout_s: float, steps: output.Steps) -> Restart:
    """Give the order and follow it. Raises SetupError where it fails, DeadlineExceeded after `timeout_s`."""
    from llmos.errors import DeadlineExceeded, SetupError, Unavailable
    from llmos.fleet.rolling import RestartOrder, give_order

    order = RestartOrder(id=secrets.token_hex(8), members=names, patience_s=drain_s)
    give_order(folder, _running(folder), order)
    begun, shown = time.monotonic(), ""
    while True:
        progress = _running(folder).restart
        mine = progress if progress is not None and progress.id == order.id else None
        waited = time.monotonic() - begun
        if mine is not None and mine.error:
            raise SetupError(f"{mine.error}; {mine.done} of {mine.total} processes were restarted")
        if mine is not None and mine.over:
            return mine
        if mine is not None and mine.member != shown:
            shown = mine.member
            steps(f"restarting {shown} ({mine.done + 1} of {mine.total})")
        if mine is None and waited > _TAKEN_UP_S:
            raise Unavailable("the fleet's supervisor does not take the order up: another restart may be under way")
        if waited > timeout_s:
            raise DeadlineExceeded(f"the restart goes on, but not to its end within {timeout_s:g} s")
        time.sleep(_POLL_S)

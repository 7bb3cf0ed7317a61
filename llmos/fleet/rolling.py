"""An ordered restart: members one after another, while the fleet serves. The order lies in the data folder.

A command writes `restart.json` and sends the supervisor SIGUSR1; how far it has come stands in the state file.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from llmos.errors import NotFound, SetupError, Unavailable
from llmos.fleet.identity import send_signal
from llmos.fleet.keeper import Keeper
from llmos.fleet.state import FleetState, Restart, replace_file

ORDER_FILE = "restart.json"
SIGNAL = signal.SIGUSR1
_ALONE_S = 2.0
"""Nothing can move away from the only worker, so that its streams wait for its successor instead of their end."""
_SECONDS_TO_MOVE = 30.0
"""For workers: what finds no room elsewhere within this time waits for some, without an error."""


class RestartOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be restarted."""

    id: str
    members: tuple[str, ...]
    """Names, in any order; empty: every member."""
    patience_s: float
    """How long a gateway lets its streams end before it ends them with an error that can be resumed."""


def give_order(data_dir: Path, state: FleetState, order: RestartOrder) -> None:
    """Hand an order to the supervisor. Raises NotFound for an unknown member, Unavailable if the fleet is gone."""
    known = {member.name for member in state.members}
    for name in order.members:
        if name not in known:
            raise NotFound(f"the fleet has no member '{name}'; it has {', '.join(sorted(known))}")
    replace_file(data_dir / ORDER_FILE, msgspec.json.encode(order))
    if not send_signal(state.supervisor, SIGNAL):
        raise Unavailable("the fleet's supervisor is gone: start the fleet with `llmos up`")


def read_order(data_dir: Path) -> RestartOrder | None:
    """The order that was given last; None if there is none that can be read."""
    try:
        return msgspec.json.decode((data_dir / ORDER_FILE).read_bytes(), type=RestartOrder)
    except (OSError, msgspec.MsgspecError):
        return None


async def carry_out(order: RestartOrder, keepers: Sequence[Keeper], show: Callable[[Restart], None]) -> None:
    """Renew each member that is meant, in the order of their start. The first that fails ends it; `show` gets each
    step."""
    meant = [keeper for keeper in keepers if not order.members or keeper.post.name in order.members]
    progress = Restart(id=order.id, total=len(meant))
    for done, keeper in enumerate(meant):
        progress = msgspec.structs.replace(progress, done=done, member=keeper.post.name)
        show(progress)
        try:
            await keeper.renew(_patience_s(keeper, keepers, order))
        except SetupError as error:
            show(msgspec.structs.replace(progress, error=error.message, over=True))
            return
    show(msgspec.structs.replace(progress, done=len(meant), member="", over=True))


class Orders:
    """Waits for orders and carries them out, one after another."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._given = asyncio.Event()

    async def run(self, keepers: Sequence[Keeper], show: Callable[[Restart], None]) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(SIGNAL, self._given.set)
        last = ""
        try:
            while True:
                await self._given.wait()
                self._given.clear()
                order = read_order(self._data_dir)
                if order is not None and order.id != last:
                    last = order.id
                    await carry_out(order, keepers, show)
        finally:
            loop.remove_signal_handler(SIGNAL)


def _patience_s(keeper: Keeper, keepers: Sequence[Keeper], order: RestartOrder) -> float:
    if keeper.post.role != "worker":
        return order.patience_s
    others = [other for other in keepers if other.post.role == "worker" and other is not keeper]
    alone = not any(other.status == "running" for other in others)
    return min(order.patience_s, _ALONE_S if alone else _SECONDS_TO_MOVE)

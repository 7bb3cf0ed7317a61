"""An engine process whose backend misbehaves on command.

Orders are files in the folder that LLMOS_TEST_ORDERS names, one folder per worker, looked at once a step:

    stale    attempts that run when it appears make `STALE` instead of their tokens: whoever accepts one shows it
    invalid  every output comes with an index too far
    hog      takes 8 MiB with every step, until it dies of it
    leak     takes 256 KiB with every step, and goes on
    late     what comes is begun `LATE_S` seconds after it came
    mute     every second attempt that runs when it appears gets no token any more
    abort    ends the process at a step in which a prompt contains `POISON` (echo alone)
    nan      the model's logits are not numbers (torch alone)
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker import backends, engine_process
from worker.backend import Attempt, Backend, Epoch, Output, StepResult
from worker.backends import echo

if TYPE_CHECKING:
    _Base = Backend
else:
    _Base = object

STALE = 1
"""A token outside the echo alphabet."""
POISON = "poisonous"
ORDERS = "LLMOS_TEST_ORDERS"
LATE_S = 3.0
_PAUSE_S = 0.02
_HOG_BYTES, _LEAK_BYTES = 8 << 20, 256 << 10


class Faulty(_Base):
    """A backend under orders; mixed in before a real one."""

    stale_token = STALE

    def obey(self, orders: Path) -> None:
        """Where orders come from; once, before the first attempt."""
        self.orders = orders
        self._admitted: dict[tuple[str, Epoch], float] = {}
        """Seconds since 1970, as files have them."""
        self._poisoned: set[str] = set()
        self._put_off: list[tuple[float, Attempt]] = []
        """What has come and is not begun, and when it will be: monotonic seconds."""
        self._taken: list[bytearray] = []

    def admit(self, attempt: Attempt) -> None:
        if (self.orders / "late").exists():
            self._put_off.append((time.monotonic() + LATE_S, attempt))
        else:
            self._begin(attempt)

    def _begin(self, attempt: Attempt) -> None:
        super().admit(attempt)
        self._admitted[attempt.request_id, attempt.epoch] = time.time()
        if POISON.encode() in bytes(token for token in attempt.prompt if token < 256):  # one per byte, in echo
            self._poisoned.add(attempt.request_id)

    def cancel(self, request_id: str, choice: int | None = None, keep_until: int | None = None) -> None:
        super().cancel(request_id, choice, keep_until)
        if choice is None:
            self._put_off = [one for one in self._put_off if one[1].request_id != request_id]
            self._poisoned.discard(request_id)

    def busy(self) -> bool:
        return bool(self._put_off) or super().busy()

    def step(self) -> StepResult:
        while self._put_off and self._put_off[0][0] <= time.monotonic():
            self._begin(self._put_off.pop(0)[1])
        if not super().busy():
            time.sleep(_PAUSE_S)
            return StepResult()
        found = {order.name for order in self.orders.iterdir()} if self.busy() else set()
        if "abort" in found and self._poisoned:
            os.abort()
        if "hog" in found:
            self._take(_HOG_BYTES)
        if "leak" in found:
            self._take(_LEAK_BYTES)
        result = super().step()
        if "invalid" in found:
            result = _each(result, lambda output: dataclasses.replace(output, index=output.index + 3))
        if "mute" in found:
            result = self._muted(result)
        return self._as_stale(result) if "stale" in found else result

    def _take(self, size: int) -> None:
        self._taken.append(bytearray(os.urandom(4096) * (size // 4096)))

    def _muted(self, result: StepResult) -> StepResult:
        ordered_at = (self.orders / "mute").stat().st_mtime
        running = [(output.request_id, output.epoch) for output in result.outputs]
        silent = {name for name in running if self._admitted[name] < ordered_at and sum(name[0].encode()) % 2}
        outputs = [output for output in result.outputs if (output.request_id, output.epoch) not in silent]
        return dataclasses.replace(result, outputs=outputs)

    def _as_stale(self, result: StepResult) -> StepResult:
        ordered_at = (self.orders / "stale").stat().st_mtime
        return _each(
            result,
            lambda output: (
                dataclasses.replace(output, token_ids=[self.stale_token] * len(output.token_ids))
                if self._admitted[output.request_id, output.epoch] < ordered_at
                else output
            ),
        )


def _each(result: StepResult, change: Any) -> StepResult:
    outputs: list[Output] = [change(output) for output in result.outputs]
    return dataclasses.replace(result, outputs=outputs)


class FaultyEcho(Faulty, echo.EchoBackend):
    """The echo backend under orders."""


def create(name: str, **options: Any) -> tuple[Backend, str]:
    """In the place of `worker.backends.create`."""
    environment: Mapping[str, str] = os.environ
    orders = Path(environment[ORDERS])
    if name == "torch":
        from tests.faults.doubles import torch_engine

        return torch_engine.create(orders, **options)
    backend = FaultyEcho(tokens_per_second=options["tokens_per_second"], load_s=options["load_s"])
    backend.obey(orders)
    return backend, echo.FINGERPRINT


if __name__ == "__main__":
    backends.create = create  # type: ignore[assignment]
    sys.exit(engine_process.main(sys.argv))

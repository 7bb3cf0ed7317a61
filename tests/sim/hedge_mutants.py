"""Seeded bugs of hedges. `mutants.py` enters them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from scheduler import events, frames, hedging, lifecycle
from tests.sim.planting import handler, mutant, nothing, put


@mutant("both hedges commit: the output of either is taken")
def _both_hedges_commit(stack: ExitStack) -> None:
    put(stack, hedging, "commit", nothing)


@mutant("the loser of two hedges is never cancelled")
def _loser_goes_on(stack: ExitStack) -> None:
    real = lifecycle.end_attempt

    def end(*args: Any, tell: bool, **more: Any) -> None:
        real(*args, tell=False, **more)

    put(stack, hedging, "end_attempt", end)
    put(stack, frames, "_stop_unwanted", nothing)


@mutant("a request is hedged although there is output")
def _hedged_in_mid_stream(stack: ExitStack) -> None:
    real = hedging.late

    def late(state: Any, event: Any, now: float, out: Any) -> None:
        for live in list(state.requests.values()):
            attempt = live.attempt
            if attempt is not None and attempt.produced and not live.hedged:
                option = state.placement.place(live)
                if option is not None and option.worker.id != attempt.worker_id:
                    hedging.dispatch.start_hedge(state, live, option, "hedge", now, out)
        real(state, event, now, out)

    handler(stack, events.AttemptLate, late)

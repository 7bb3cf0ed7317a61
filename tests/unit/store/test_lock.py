"""The lock excludes, gives up at its deadline, and says who holds it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmos.errors import StoreBusy
from llmos.store import lock
from tests.fakes.clock import ManualClock


def test_a_second_holder_waits_until_its_deadline(tmp_path: Path) -> None:
    clock = ManualClock()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock.advance(seconds)

    waiting = lock.held(tmp_path / "l", 1.0, clock=clock, sleep=sleep)
    with lock.held(tmp_path / "l", 0), pytest.raises(StoreBusy, match=str(os.getpid())):
        waiting.__enter__()
    assert 1.0 <= sum(waits) <= 1.0 + 2 * lock.POLL_S


def test_a_waiting_holder_gets_it_when_it_is_free(tmp_path: Path) -> None:
    clock = ManualClock()
    first = lock.held(tmp_path / "l", 0)
    first.__enter__()

    def sleep(seconds: float) -> None:
        clock.advance(seconds)
        first.__exit__(None, None, None)

    with lock.held(tmp_path / "l", 1.0, clock=clock, sleep=sleep):
        assert (tmp_path / "l").read_text() == str(os.getpid())


def test_an_error_inside_frees_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError), lock.held(tmp_path / "l", 0):
        raise ValueError
    with lock.held(tmp_path / "l", 0):
        pass


def test_different_locks_do_not_meet(tmp_path: Path) -> None:
    with lock.held(tmp_path / "a", 0), lock.held(tmp_path / "b", 0):
        pass

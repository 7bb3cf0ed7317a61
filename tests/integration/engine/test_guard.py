"""The process in which constraints are tried: what it refuses, what it survives."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmos.clock import SystemClock
from llmos.errors import InvalidConstraint, Unavailable, UnsupportedFeature
from tests.fakes import json_tokens
from tests.fakes.clock import ManualClock
from tests.fakes.json_tokens import END, SIZE, decode, encode
from tests.integration.engine.tiny import attempt
from worker.backend import Constraint
from worker.engine.grammar.checker import died
from worker.engine.grammar.grammars import open_grammars
from worker.engine.grammar.guard import Guard

pytestmark = pytest.mark.torch

ENDLESS = Constraint("json_schema", '{"type": "integer", "multipleOf": 9999991}')
"""Compiling it would take more than ten seconds."""
GOOD = Constraint("regex", "a+b?")


@pytest.fixture
def guard() -> Iterator[Guard]:
    guard = Guard(SystemClock())
    yield guard
    guard.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return json_tokens.write(tmp_path)


def test_endless_work_is_cut_off_and_the_next_check_goes_on(guard: Guard, folder: Path) -> None:
    key = guard.open(folder, SIZE, {END})
    first = guard.pid
    guard.check(key, GOOD)
    with pytest.raises(InvalidConstraint, match="too complex"):
        _until_decided(lambda: guard.check(key, ENDLESS))
    guard.check(key, GOOD)
    assert guard.pid == first


def test_only_a_check_that_had_the_processor_says_something_about_the_constraint() -> None:
    assert died(1, signal.SIGKILL, 0.06).code == "unavailable"
    assert died(1, signal.SIGKILL, 0.1).code == "invalid_constraint"
    assert died(1, signal.SIGPROF, 0.06).code == "invalid_constraint"
    assert died(1, signal.SIGABRT, 0.0).code == "invalid_constraint"


def test_a_process_that_dies_is_replaced(guard: Guard, folder: Path) -> None:
    key = guard.open(folder, SIZE, {END})
    guard.check(key, GOOD)
    first = guard.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    _check_until_answered(guard, key)
    assert guard.pid not in (None, first)


def test_a_process_that_hangs_is_replaced(folder: Path) -> None:
    clock = ManualClock()
    guard = Guard(clock)
    key = guard.open(folder, SIZE, {END})
    guard.check(key, GOOD)
    first = guard.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(Unavailable):
        guard.check(key, GOOD)
    assert guard.pid == first
    clock.advance(11)
    _check_until_answered(guard, key)
    assert guard.pid not in (None, first)
    guard.close()


def _until_decided(check: Callable[[], object]) -> None:
    for _ in range(10):
        with contextlib.suppress(Unavailable):  # a busy machine gave it too little of the processor
            check()
            return
    raise AssertionError


def _check_until_answered(guard: Guard, key: int) -> None:
    for _ in range(3):
        with contextlib.suppress(Unavailable):  # the end of the old one may not have been noticed yet
            return guard.check(key, GOOD)
    raise AssertionError


def test_attempts_get_matchers_that_stand_where_their_choices_do(guard: Guard, folder: Path) -> None:
    grammars = open_grammars(guard, folder, SIZE, frozenset({END}), SystemClock())
    assert grammars is not None
    resumed = attempt("a", [1], choices=3, resume={1: encode("aab")}, finished_choices=frozenset({0}))
    found = grammars.prepare(resumed, GOOD).result(10)
    assert {number: matcher.complete for number, matcher in found.items()} == {1: True, 2: False}
    with pytest.raises(InvalidConstraint):
        _until_decided(lambda: grammars.prepare(resumed, ENDLESS).result(10))
    refused = [grammars.prepare(resumed, ENDLESS) for _ in range(8)]
    errors = {id(error): error for future in refused if (error := future.exception(10))}
    assert all(isinstance(error, InvalidConstraint) for error in errors.values())
    # An error that were kept and raised again would keep every attempt that met it.
    assert len(errors) == len(refused)
    with pytest.raises(InvalidConstraint):
        grammars.prepare(attempt("b", [1], resume={0: encode("ac")}), GOOD).result(10)
    grammars.close()


def test_a_model_whose_tokenizer_does_not_fit_has_no_grammars(guard: Guard, tmp_path: Path, folder: Path) -> None:
    (other := tmp_path / "other").mkdir()
    assert open_grammars(guard, other, SIZE, frozenset(), SystemClock()) is None
    with pytest.raises(UnsupportedFeature):
        guard.check(guard.open(other, SIZE, ()), GOOD)
    guard.check(guard.open(folder, SIZE, {END}), GOOD)
    assert decode(encode("aab")) == "aab"

"""Attempts whose constraint is being checked and compiled: they wait beside the roster and hold nobody up."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

from llmos.errors import InternalError, LlmosError
from worker.engine.grammar.grammars import Matchers
from worker.engine.run import Run

log = logging.getLogger(__name__)


class Preparing:
    """By request, in order of arrival. Called by the engine's thread."""

    def __init__(self) -> None:
        self._runs: dict[str, tuple[Run, Future[Matchers]]] = {}

    def __bool__(self) -> bool:
        return bool(self._runs)

    @property
    def runs(self) -> list[Run]:
        """All of them."""
        return [run for run, _ in self._runs.values()]

    def find(self, request_id: str) -> Run | None:
        """The request's attempt, if it is here."""
        found = self._runs.get(request_id)
        return None if found is None else found[0]

    def add(self, run: Run, matchers: Future[Matchers]) -> None:
        """Keep an attempt until its matchers are there."""
        self._runs[run.attempt.request_id] = run, matchers

    def forget(self, run: Run) -> None:
        """Drop an attempt."""
        _, matchers = self._runs.pop(run.attempt.request_id)
        matchers.cancel()

    def ready(self) -> Iterator[tuple[Run, LlmosError | None]]:
        """Attempts that need wait no longer: their choices have matchers, or there is an error. They leave."""
        for run, matchers in [entry for entry in self._runs.values() if entry[1].done()]:
            del self._runs[run.attempt.request_id]
            try:
                for number, matcher in matchers.result().items():
                    if number in run.choices:
                        run.choices[number].matcher = matcher
                yield run, None
            except LlmosError as error:
                yield run, error
            except Exception:  # a bug met by one request must not end the others
                log.exception("a constraint could not be prepared")
                yield run, InternalError("The constraint could not be prepared.")

    def wait(self, timeout_s: float) -> None:
        """Until one is ready, at most so long."""
        wait([matchers for _, matchers in self._runs.values()], timeout_s, FIRST_COMPLETED)

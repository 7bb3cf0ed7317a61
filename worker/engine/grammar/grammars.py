"""Matchers for attempts, made beside the step loop: checked in the checker process, compiled, brought to the tokens.

Verdicts are kept, compiled grammars are not: copies of one share a lexer whose limits they would use up together, and
whether a request can be followed must depend on that request alone.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from llguidance import LLMatcher

from llmos.clock import Clock
from llmos.errors import InvalidConstraint, Overloaded, UnsupportedFeature
from worker.backend import Attempt, Constraint
from worker.engine.grammar.guard import Guard
from worker.engine.grammar.matcher import Matcher
from worker.engine.grammar.vocabulary import PARAM, Vocabulary

Matchers = Mapping[int, Matcher]
"""By choice."""

_THREADS = 2
_WAIT_S = 10.0
"""An attempt whose constraint nobody has begun to look at for this long is refused."""
_VERDICTS = 1024


class Grammars:
    """Prepares attempts of one model. `prepare` is called by one thread; the work is done by others."""

    def __init__(self, guard: Guard, vocabulary: Vocabulary, key: int, clock: Clock) -> None:
        """`key`: what the guard calls the vocabulary."""
        self._guard = guard
        self._vocabulary = vocabulary
        self._key = key
        self._clock = clock
        self._new = ThreadPoolExecutor(_THREADS, thread_name_prefix="new-constraints")
        self._known = ThreadPoolExecutor(_THREADS, thread_name_prefix="constraints")
        """Those with a verdict do not queue behind those without."""
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, Future[str]] = OrderedDict()
        """Why each was refused; empty: it was not. Text, as an exception would keep all that it was raised for."""

    def prepare(self, attempt: Attempt, constraint: Constraint) -> Future[Matchers]:
        """Matchers of the attempt's choices, soon; or an LlmosError."""
        key = hashlib.sha256(repr(constraint).encode()).digest()
        with self._lock:
            verdict = self._verdicts.get(key)
        threads = self._known if verdict is not None and verdict.done() else self._new
        return threads.submit(self._prepare, attempt, constraint, key, self._clock.monotonic() + _WAIT_S)

    def close(self) -> None:
        """Prepare nothing more."""
        for threads in (self._new, self._known):
            threads.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, attempt: Attempt, constraint: Constraint, key: bytes, begin_until: float) -> Matchers:
        if self._clock.monotonic() > begin_until:
            raise Overloaded("Too many constraints wait to be checked; try again.", retry_after_s=1.0)
        self._check(constraint, key)
        start = self._vocabulary.compile(constraint)
        choices = set(range(attempt.choices)) - attempt.finished_choices
        return {number: self._matcher(attempt, number, start) for number in choices}

    def _matcher(self, attempt: Attempt, number: int, start: LLMatcher) -> Matcher:
        matcher = Matcher(start, self._vocabulary, ignore_eos=attempt.ignore_eos)
        matcher.advance(attempt.resume.get(number, ()))
        return matcher

    def _check(self, constraint: Constraint, key: bytes) -> None:
        """Raise what the checker process says, or said, of the constraint. Threads with the same one ask once."""
        with self._lock:
            verdict = self._verdicts.get(key)
            asks = verdict is None
            if verdict is None:
                verdict = self._verdicts[key] = Future()
            self._verdicts.move_to_end(key)
            if len(self._verdicts) > _VERDICTS:
                self._verdicts.popitem(last=False)
        if asks:
            self._ask(key, constraint, verdict)
        refusal = verdict.result()
        if refusal:
            raise InvalidConstraint(refusal, param=PARAM)

    def _ask(self, key: bytes, constraint: Constraint, verdict: Future[str]) -> None:
        try:
            self._guard.check(self._key, constraint)
        except InvalidConstraint as error:
            verdict.set_result(error.message)
        except BaseException as error:
            with self._lock:
                self._verdicts.pop(key, None)
            verdict.set_exception(error)
        else:
            verdict.set_result("")


def open_grammars(guard: Guard, folder: Path, size: int, end_tokens: frozenset[int], clock: Clock) -> Grammars | None:
    """Grammars of a model; None if its tokenizer cannot be used. See `Vocabulary`."""
    # The process starts while this one reads.
    key = guard.open(folder, size, end_tokens)
    try:
        return Grammars(guard, Vocabulary(folder, size, end_tokens), key, clock)
    except UnsupportedFeature:
        return None

"""The step loop under random loads: every choice gets what it gets alone, no block is lost, whatever is cancelled."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch

from llmos.clock import SystemClock
from tests.fakes.hash_model import END, VOCABULARY, HashModel, logits
from worker.backend import Attempt, Epoch, FinishReason, Output, Sampling
from worker.engine.engine import Engine, EngineOptions
from worker.engine.kv import BLOCK_TOKENS
from worker.engine.lora import Adapter
from worker.engine.sampling import SamplingRow, sample

pytestmark = pytest.mark.torch

RANKS = {"": 0, "a": 8, "b": 16}
"""Of the adapters, by name."""
MOST_STEPS = 20_000
Answer = tuple[list[int], FinishReason]


@pytest.mark.parametrize("seed", range(6))
def test_everybody_gets_what_they_get_alone_and_all_blocks_come_back(seed: int) -> None:
    load = Load(random.Random(seed))
    for _ in range(MOST_STEPS):
        load.disturb()
        if load.engine.busy():
            load.step()
        elif not load.left:
            break
    assert not load.requests
    blocks = load.engine.blocks()
    assert blocks.free == blocks.total


def alone(attempt: Attempt) -> dict[int, Answer]:
    """What each choice of an attempt comes to, from the definition."""
    return {number: _choice(attempt, number) for number in range(attempt.choices)}


def _choice(attempt: Attempt, number: int) -> Answer:
    tokens: list[int] = []
    stops = attempt.stop_token_ids | (frozenset() if attempt.ignore_eos else {END})
    rank = RANKS[attempt.adapter]
    while True:
        barred = stops if len(tokens) < attempt.min_tokens else ()
        text = [*attempt.prompt, *tokens]
        row = SamplingRow(attempt.sampling, number, attempt.prompt, tokens, barred)
        (pick,) = sample(logits(text, [rank] * len(text))[None], [row])
        assert pick is not None
        tokens.append(pick.token_id)
        if pick.token_id in stops:
            return tokens, FinishReason.STOP
        if len(tokens) == attempt.max_tokens:
            return tokens, FinishReason.LENGTH


@dataclass
class Request:
    """What is expected of an attempt, and what has come."""

    attempt: Attempt
    expected: dict[int, Answer]
    got: dict[int, list[int]]
    """By choice that is still wanted, resumed tokens included."""
    keep: dict[int, int] = field(default_factory=dict)

    def take(self, output: Output) -> None:
        """A piece must go on where the last one ended, with the tokens that are expected."""
        tokens, finish = self.expected[output.choice]
        got = self.got[output.choice]
        assert output.index == len(got)
        got += output.token_ids
        assert got == tokens[: len(got)]
        assert output.finish in (None, finish)
        assert (output.finish is not None) == (len(got) == len(tokens))
        if output.finish is not None or len(got) >= self.keep.get(output.choice, len(got) + 1):
            del self.got[output.choice]


class Load:
    """An engine with few blocks, and random requests at it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        options = EngineOptions(max_running=rng.choice([1, 3, 8, 64]), drafting=rng.random() < 0.8)
        self.engine = Engine(HashModel(), rng.choice([9, 10, 14, 40]), SystemClock(), name="m", options=options)
        for name, rank in RANKS.items():
            if name:
                self.engine.load_adapter(name, Adapter(rank, {}))
        self._shared = [self._text(length) for length in (10, 64, 128, 150)]
        self.left = 15
        """Requests that are still to come."""
        self.requests: dict[str, Request] = {}

    def disturb(self) -> None:
        """Perhaps a request comes, goes, or wants less of one of its choices."""
        rng = self._rng
        if self.left and rng.random() < 0.15:
            self.left -= 1
            self._admit(self._attempt())
        if self.requests and rng.random() < 0.03:
            self.engine.cancel(self.requests.popitem()[0], None, None)
        if self.requests and rng.random() < 0.05:
            self._keep(rng.choice(list(self.requests.values())))

    def step(self) -> None:
        """One step, whose output must be what is expected; afterwards every block has as many holders as it counts."""
        result = self.engine.step()
        assert not result.failures
        for output in result.outputs:
            self.requests[output.request_id].take(output)
        self.requests = {name: request for name, request in self.requests.items() if request.got}
        held = Counter(block for run in self.engine._roster.runs for kv in run._kvs() for block in kv.blocks)
        assert [held[block] for block in range(self.engine.blocks().total)] == self.engine._manager._references

    def _admit(self, attempt: Attempt) -> None:
        expected = alone(attempt)
        if self._rng.random() < 0.4:
            known = {number: tokens[: self._rng.randrange(len(tokens))] for number, (tokens, _) in expected.items()}
            attempt = replace(attempt, resume=known)
        self.engine.admit(attempt)
        got = {number: list(attempt.resume.get(number, ())) for number in expected}
        self.requests[attempt.request_id] = Request(attempt, expected, got)

    def _keep(self, request: Request) -> None:
        choice = self._rng.choice(list(request.got))
        wanted = request.keep[choice] = self._rng.randrange(request.attempt.max_tokens + 1)
        self.engine.cancel(request.attempt.request_id, choice, wanted)
        if len(request.got[choice]) >= wanted:
            del request.got[choice]
        if not request.got:
            del self.requests[request.attempt.request_id]

    def _attempt(self) -> Attempt:
        rng = self._rng
        prompt = self._rng.choice(self._shared)[: rng.choice([0, 64, 150])] + self._text(rng.choice([1, 5, 40, 64, 70]))
        tenant, adapter = rng.choice(["one", "two"]), rng.choice(["", "", *RANKS])
        most = rng.choice([1, 2, 10, 40, 80])
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.7, 1.2]),
            top_k=rng.choice([0, 3]),
            top_p=rng.choice([1.0, 0.9]),
            presence_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.1]),
            seed=rng.getrandbits(64),
        )
        return Attempt(
            f"r{self.left}",
            Epoch(1, 1),
            "m",
            prompt,
            most,
            choices=rng.choice([1, 1, 2, 3]) if most < 80 else 1,
            sampling=sampling,
            min_tokens=rng.choice([0, min(5, most)]),
            stop_token_ids=rng.choice([frozenset(), frozenset({3})]),
            ignore_eos=rng.random() < 0.3,
            priority=rng.choice([0, 1, 1, 2]),
            adapter=adapter,
            prefix_hashes=_hashes(prompt, tenant + adapter) if rng.random() < 0.85 else (),
        )

    def _text(self, length: int) -> list[int]:
        return [self._rng.randrange(1, VOCABULARY) for _ in range(length)]


def _hashes(prompt: list[int], salt: str) -> list[int]:
    ends = range(BLOCK_TOKENS, len(prompt) + 1, BLOCK_TOKENS)
    digests = (hashlib.blake2b(salt.encode() + bytes(prompt[:end]), digest_size=8).digest() for end in ends)
    return [int.from_bytes(digest, "little") for digest in digests]


def test_the_model_draws_on_what_lies_in_its_memory() -> None:
    """One token of the past changes the logits: or the test above would see nothing."""
    assert not torch.equal(logits([1, 2, 3], [0, 0, 0]), logits([1, 4, 3], [0, 0, 0]))
    assert not torch.equal(logits([1, 2, 3], [0, 0, 0]), logits([1, 2, 3], [0, 8, 0]))

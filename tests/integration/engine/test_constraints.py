"""Constrained requests in the step loop: valid, the same bytes whatever happens around them, in nobody's way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
import transformers

from bench.schemas import Schema, most_bytes, schemas, without_bounds
from llmos.clock import SystemClock
from tests.fakes import json_tokens
from tests.fakes.json_tokens import END, SIZE, decode, encode
from tests.integration.engine.test_guard import ENDLESS
from tests.integration.engine.tiny import Transcript, attempt, prompts
from worker.backend import Attempt, Constraint, FinishReason, ModelSpec, Sampling
from worker.backends.torch import TorchBackend
from worker.engine.engine import EngineOptions
from worker.engine.grammar.guard import Guard

pytestmark = pytest.mark.torch

LIMIT = 1200
KINDS = (
    Sampling(temperature=0, logprobs=1),
    Sampling(temperature=1.0, seed=3, logprobs=0),
    Sampling(temperature=1.4, seed=4, top_p=0.9, top_k=20, min_p=0.01),
    Sampling(temperature=0.8, seed=5, repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={END: 5.0}),
)
DATE = Constraint("regex", r"20\d\d-[01]\d( (the|name)){0,2}")
NAMES = Constraint("choice", texts=("the", "then", "name"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("constrained")
    config = transformers.LlamaConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2 * LIMIT,
        initializer_range=0.3,
        eos_token_id=END,
        bos_token_id=None,
    )
    torch.manual_seed(2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return json_tokens.write(folder)


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    guard = Guard(SystemClock())
    yield guard
    guard.close()


Load = Callable[..., TorchBackend]


@pytest.fixture(scope="module")
def load(folder: Path, guard: Guard) -> Load:
    def make(**options: int) -> TorchBackend:
        backend = TorchBackend(threads=1, guard=guard, options=EngineOptions(**options))
        backend.load(ModelSpec("tiny", "1", folder), 48 << 20)
        return backend

    return make


def asked(name: str, constraint: Constraint, **options: object) -> Attempt:
    prompt = [token % SIZE for token in prompts([9], seed=len(name))[0]]
    return replace(attempt(name, prompt, LIMIT), constraint=constraint, **options)  # type: ignore[arg-type]


def schema_constraint(schema: Schema) -> Constraint:
    return Constraint("json_schema", json.dumps(without_bounds(schema)))


@pytest.fixture(scope="module")
def mixed() -> Mapping[str, Attempt]:
    found = [
        asked(
            f"schema {number}", schema_constraint(schema), sampling=KINDS[number % 4], max_tokens=most_bytes(schema) + 1
        )
        for number, schema in enumerate(schemas(10, seed=7, deepest=3))
    ]
    found += [asked("date", DATE, sampling=KINDS[1], choices=3), asked("name", NAMES, sampling=KINDS[2], choices=2)]
    return {request.request_id: request for request in found}


@pytest.fixture(scope="module")
def alone(load: Load, mixed: Mapping[str, Attempt]) -> Transcript:
    backend, found = load(), Transcript()
    for request in mixed.values():
        backend.admit(request)
        found.run(backend)
    return found


def logprobs(found: Transcript) -> dict[tuple[str, int], list[object]]:
    by_choice: dict[tuple[str, int], list[object]] = {}
    for out in found.outputs:
        by_choice.setdefault((out.request_id, out.choice), []).extend(out.logprobs)
    return by_choice


def text(tokens: list[int]) -> str:
    return decode(tokens[:-1] if tokens[-1] == END else tokens)


def test_every_answer_is_what_was_asked_for_and_ends_by_itself(alone: Transcript) -> None:
    assert alone.failures == [] and set(alone.finishes.values()) == {FinishReason.STOP}
    for number, schema in enumerate(schemas(10, seed=7, deepest=3)):
        answer = json.loads(text(alone.tokens[f"schema {number}", 0]))
        jsonschema.validate(
            answer, without_bounds(schema), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
    for choice in range(3):
        assert re.fullmatch(DATE.text, text(alone.tokens["date", choice]))
    assert {text(alone.tokens["name", choice]) for choice in range(2)} <= {*NAMES.texts}


def test_the_bytes_are_the_same_among_others_and_after_preemption(
    load: Load, mixed: Mapping[str, Attempt], alone: Transcript
) -> None:
    backend = load(max_running=4)
    for request in reversed(mixed.values()):
        backend.admit(request)
    backend.admit(asked("bad", Constraint("regex", "(")))
    backend.admit(replace(asked("free", DATE), constraint=None, max_tokens=40))
    together = Transcript().run(backend)
    assert [(failure.code, failure.param) for failure in together.failures] == [("invalid_constraint", "constraint")]
    assert {key: tokens for key, tokens in together.tokens.items() if key[0] != "free"} == alone.tokens
    assert {key: entries for key, entries in logprobs(together).items() if key[0] != "free"} == logprobs(alone)


def test_the_bytes_are_the_same_resumed_at_any_index(
    load: Load, mixed: Mapping[str, Attempt], alone: Transcript
) -> None:
    backend = load()
    for name in ("schema 3", "date"):
        request = mixed[name]
        whole = {choice: alone.tokens[name, choice] for choice in range(request.choices)}
        last = max(map(len, whole.values()))
        for index in {*range(0, last, 1 + last // 8), last - 1, last}:
            resumed = {(name, choice): min(index, len(tokens)) for choice, tokens in whole.items()}
            backend.admit(replace(request, resume={choice: tokens[:index] for choice, tokens in whole.items()}))
            rest = Transcript(resumed).run(backend)
            assert rest.tokens == {(name, choice): tokens[index:] for choice, tokens in whole.items()}
            assert set(rest.finishes.values()) == {FinishReason.STOP}


def test_a_grammar_is_stronger_than_min_tokens_and_stop_tokens(load: Load) -> None:
    backend = load()
    backend.admit(asked("early", Constraint("regex", "the( name)?"), min_tokens=9, sampling=KINDS[3]))
    backend.admit(asked("barred", Constraint("choice", texts=("the",)), min_tokens=5, stop_token_ids={*encode("the")}))
    backend.admit(asked("ignore", Constraint("regex", "[a-c]{3,6}"), ignore_eos=True, sampling=KINDS[3]))
    backend.admit(asked("cut", Constraint("json_object"), max_tokens=2))
    backend.admit(asked("stop", Constraint("regex", "(ab){9}"), stop_token_ids={*encode("b")}))
    found = Transcript().run(backend)
    answers = {name: decode(tokens) for (name, _), tokens in found.tokens.items()}
    reasons = {name: reason for (name, _), reason in found.finishes.items()}
    assert answers["early"] == "the name" and answers["barred"] == "the" and answers["stop"] == "ab"
    assert len(answers["ignore"]) == 6 and END not in found.tokens["ignore", 0]
    assert reasons.pop("cut") is FinishReason.LENGTH and set(reasons.values()) == {FinishReason.STOP}
    assert found.failures == []


def test_nobody_waits_for_a_constraint_that_is_being_checked(load: Load) -> None:
    backend, found = load(), Transcript()
    backend.admit(replace(asked("free", DATE), constraint=None, max_tokens=LIMIT, ignore_eos=True))
    found.run(backend, steps=1)
    backend.admit(asked("bad", Constraint("regex", "(")))
    backend.admit(asked("endless", replace(ENDLESS, text=ENDLESS.text.replace("91", "93"))))
    before, steps = len(found.tokens["free", 0]), 0
    while len(found.failures) < 2:
        found.run(backend, steps=1)
        steps += 1
        assert ("free", 0) in found.finishes or len(found.tokens["free", 0]) >= before + steps
    assert [failure.request_id for failure in found.failures] == ["bad", "endless"]


def test_what_is_being_checked_can_be_cancelled(load: Load) -> None:
    backend = load()
    backend.admit(asked("a", ENDLESS))
    backend.admit(asked("b", NAMES, choices=2))
    backend.cancel("a")
    backend.cancel("b", choice=1)
    found = Transcript().run(backend)
    assert set(found.finishes) == {("b", 0)} and found.failures == []


def test_tokens_that_break_the_constraint_are_not_resumed(load: Load) -> None:
    backend = load()
    backend.admit(asked("a", NAMES, resume={0: encode("x")}))
    [failure] = Transcript().run(backend).failures
    assert failure.code == "invalid_constraint"

"""Life of attempts in the engine: queue, blocks, stop, cancel, failure, stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmos.errors import InvalidRequest, PromptTooLong, Unavailable
from tests.fakes.clock import ManualClock
from tests.integration.engine.tiny import CONTEXT, VOCABULARY, Transcript, attempt, generate, prompts
from worker.backend import Attempt, Epoch, FinishReason, ModelSpec, Sampling, Stage
from worker.backends.torch import TorchBackend

pytestmark = pytest.mark.torch

Load = Callable[..., TorchBackend]
Written = Callable[[str], tuple[Path, Any]]


def free(backend: TorchBackend) -> int:
    return backend.blocks()["tiny"].free


def with_blocks(load: Load, count: int) -> TorchBackend:
    """A backend whose budget holds exactly `count` blocks."""
    with pytest.raises(Unavailable) as refused:
        load("llama", budget=0)
    least = int(refused.value.message.split(" bytes")[0].split()[-1])
    block = 64 * 4 * 2 * 2 * 2 * 12
    backend = load("llama", budget=least + (count - 1) * block)
    assert backend.blocks()["tiny"].total == count
    return backend


def test_attempts_wait_in_order_until_their_blocks_are_free(loaded: Load) -> None:
    backend = with_blocks(loaded, 4)
    long, short = prompts((100, 5))
    backend.admit(attempt("first", long, 20))
    backend.admit(attempt("big", long, 100))
    backend.admit(attempt("small", short, 5))
    found = Transcript().run(backend, steps=3)
    assert free(backend) == 2
    # `small` would fit beside `first`, but must not overtake `big`.
    assert {key[0] for key in found.tokens} == {"first"}
    found.run(backend)
    assert [len(found.tokens[name, 0]) for name in ("first", "big", "small")] == [20, 100, 5]
    assert free(backend) == 4


def test_what_can_never_run_is_refused(loaded: Load) -> None:
    backend = with_blocks(loaded, 4)
    [prompt] = prompts([200])
    with pytest.raises(Unavailable):
        backend.admit(attempt("blocks", prompt, 100))
    with pytest.raises(Unavailable):
        backend.admit(attempt("choices", prompt[:100], 28, choices=4))
    with pytest.raises(PromptTooLong):
        backend.admit(attempt("context", prompt, CONTEXT))
    with pytest.raises(Unavailable):
        backend.admit(replace(attempt("model", prompt), model="other"))
    assert not backend.busy()


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": []},
        {"prompt": [VOCABULARY]},
        {"prompt": [-1]},
        {"max_tokens": 0},
        {"stop_token_ids": frozenset({VOCABULARY})},
        {"sampling": Sampling(logit_bias={VOCABULARY + 7: 1.0})},
        {"resume": {0: [VOCABULARY]}},
        {"resume": {0: [1] * 17}},
    ],
)
def test_a_request_that_would_break_a_step_is_refused(wrong: dict[str, Any], loaded: Load) -> None:
    with pytest.raises(InvalidRequest):
        loaded("llama").admit(replace(attempt("a", [1, 2]), **wrong))


def greedy(written: Written, prompt: list[int], tokens: int) -> list[int]:
    return generate(written("llama")[1], prompt, tokens)


def first_new(tokens: list[int]) -> int:
    """A position, past the third, of a token that did not occur before."""
    return next(number for number in range(3, len(tokens)) if tokens[number] not in tokens[:number])


def test_a_stop_token_ends_the_choice_and_is_delivered(loaded: Load, written: Written) -> None:
    [prompt] = prompts([9])
    expected = greedy(written, prompt, 30)
    end = first_new(expected)
    backend = loaded("llama")
    backend.admit(attempt("a", prompt, 30, stop_token_ids=frozenset({expected[end]})))
    found = Transcript().run(backend)
    assert found.tokens["a", 0] == expected[: end + 1]
    assert found.finishes["a", 0] is FinishReason.STOP


def test_no_stop_token_before_min_tokens(loaded: Load, written: Written) -> None:
    [prompt] = prompts([9])
    stop = greedy(written, prompt, 1)[0]
    backend = loaded("llama")
    backend.admit(attempt("a", prompt, 40, stop_token_ids=frozenset({stop}), min_tokens=6))
    tokens = Transcript().run(backend).tokens["a", 0]
    assert stop not in tokens[:6]
    assert len(tokens) > 6


def test_the_models_own_end_token_stops_unless_ignored(loaded: Load, written: Written, tmp_path: Path) -> None:
    [prompt] = prompts([9])
    folder, reference = written("llama")
    expected = generate(reference, prompt, 30)
    end = first_new(expected)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{expected[end]}, 0]}}')
    backend = TorchBackend(threads=1)
    backend.load(ModelSpec("tiny", "1", tmp_path), 64 << 20)
    backend.admit(attempt("a", prompt, 30))
    backend.admit(attempt("b", prompt, 30, ignore_eos=True))
    found = Transcript().run(backend)
    assert found.tokens["a", 0] == expected[: end + 1]
    assert found.finishes == {("a", 0): FinishReason.STOP, ("b", 0): FinishReason.LENGTH}
    assert found.tokens["b", 0] == expected


def test_cancel_frees_everything_before_the_next_step(loaded: Load) -> None:
    backend = loaded("llama")
    total = free(backend)
    long, short = prompts((150, 5))
    backend.admit(attempt("prefilling", long, 20, choices=2))
    backend.admit(attempt("decoding", short, 100))
    Transcript().run(backend, steps=1)
    backend.admit(attempt("waiting", short, 20))
    assert free(backend) < total
    for name in ("prefilling", "decoding", "waiting", "unknown", "decoding"):
        backend.cancel(name)
    assert free(backend) == total
    assert not backend.busy()


def test_a_choice_ends_once_it_has_what_is_still_wanted(loaded: Load) -> None:
    backend = loaded("llama")
    [prompt] = prompts([20])
    backend.admit(attempt("a", prompt, 12, choices=3, sampling=Sampling(seed=4)))
    found = Transcript().run(backend, steps=3)
    backend.cancel("a", choice=0, keep_until=7)
    backend.cancel("a", choice=1, keep_until=2)
    backend.cancel("a", choice=9)
    found.run(backend)
    assert [len(found.tokens["a", choice]) for choice in range(3)] == [7, 3, 12]
    assert found.finishes == {("a", 2): FinishReason.LENGTH}
    backend.admit(attempt("b", prompt, 12))
    backend.cancel("b", choice=0)
    assert not backend.busy()


def test_a_choice_cancelled_during_its_prefill_leaves_its_siblings_alone(loaded: Load) -> None:
    backend = loaded("llama")
    [prompt] = prompts([150])
    options = Sampling(seed=4)
    backend.admit(attempt("a", prompt, 8, choices=2, sampling=options))
    whole = Transcript().run(backend)
    backend.admit(attempt("a", prompt, 8, choices=2, sampling=options))
    found = Transcript().run(backend, steps=1)
    backend.cancel("a", choice=0)
    found.run(backend)
    assert found.tokens == {("a", 1): whole.tokens["a", 1]}


def test_only_a_higher_epoch_replaces_an_attempt(loaded: Load, written: Written) -> None:
    backend = loaded("llama")
    [prompt] = prompts([9])
    expected = greedy(written, prompt, 10)
    backend.admit(attempt("a", prompt, 10, epoch=Epoch(2, 2)))
    found = Transcript().run(backend, steps=2)
    for stale in (Epoch(2, 2), Epoch(2, 1), Epoch(1, 9)):
        backend.admit(attempt("a", [1], 10, epoch=stale))
    found.run(backend, steps=2)
    assert found.tokens["a", 0] == expected[:4]
    backend.admit(attempt("a", prompt, 10, epoch=Epoch(3, 1), resume={0: expected[:2]}))
    rest = Transcript({("a", 0): 2}).run(backend)
    assert {output.epoch for output in rest.outputs} == {Epoch(3, 1)}
    assert rest.tokens["a", 0] == expected[2:]


def test_an_attempt_resumed_at_its_end_only_finishes(loaded: Load) -> None:
    backend = loaded("llama")
    ended = attempt("a", [1, 2], 4, choices=3, resume={0: [9, 9, 9, 9], 1: [9, 7], 2: [9]}, min_tokens=1)
    backend.admit(replace(ended, stop_token_ids=frozenset({7})))
    found = Transcript({("a", 0): 4, ("a", 1): 2, ("a", 2): 1}).run(backend)
    assert found.tokens["a", 0] == found.tokens["a", 1] == []
    assert found.finishes["a", 0] is FinishReason.LENGTH
    assert found.finishes["a", 1] is FinishReason.STOP
    assert len(found.tokens["a", 2]) <= 3 and ("a", 2) in found.finishes


def poisoned(source: Path, target: Path, token: int) -> Path:
    """The model, with an embedding that is not a number for one token."""
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_an_attempt_that_breaks_fails_alone(loaded: Load, written: Written, tmp_path: Path) -> None:
    sound = prompts((9, 40, 64))
    expected = {(str(number), 0): greedy(written, prompt, 10) for number, prompt in enumerate(sound)}
    used = {token for tokens in (*sound, *expected.values()) for token in tokens}
    poison = next(token for token in range(VOCABULARY) if token not in used)
    backend = TorchBackend(threads=1)
    backend.load(ModelSpec("tiny", "1", poisoned(written("llama")[0], tmp_path, poison)), 64 << 20)
    total = free(backend)
    requests: list[Attempt] = [attempt(str(number), prompt, 10) for number, prompt in enumerate(sound)]
    requests.insert(1, attempt("poison", [3, poison, 4], 10, choices=2))
    for request in requests:
        backend.admit(request)
    found = Transcript().run(backend)
    assert [(failure.request_id, failure.code) for failure in found.failures] == [("poison", "unsound_output")]
    assert found.tokens == expected
    assert free(backend) == total


def test_stages_tell_when_and_how_much(written: Written) -> None:
    clock = ManualClock()
    backend = TorchBackend(threads=1, clock=clock)
    backend.load(ModelSpec("tiny", "1", written("llama")[0]), 64 << 20)
    begun = clock.monotonic()
    [prompt] = prompts([150])
    backend.admit(attempt("a", prompt, 5, choices=2, resume={1: [7, 8]}))
    found = Transcript({("a", 1): 2})
    while backend.busy():
        found.run(backend, steps=1)
        clock.advance(1.0)
    prefill, decode = found.stages
    assert (prefill.stage, prefill.tokens, prefill.start_s) == (Stage.PREFILL, 150 + 2, begun)
    assert (decode.stage, decode.tokens) == (Stage.DECODE, 5 + 3)
    assert decode.start_s == prefill.end_s > begun
    assert decode.end_s > decode.start_s


def test_models_are_stepped_side_by_side_and_forgotten(loaded: Load, written: Written) -> None:
    backend = loaded("llama")
    backend.load(ModelSpec("other", "1", written("gpt2")[0]), 64 << 20)
    [prompt] = prompts([9])
    backend.admit(attempt("a", prompt, 6))
    backend.admit(replace(attempt("b", prompt, 6), model="other"))
    found = Transcript().run(backend, steps=2)
    assert {key: len(tokens) for key, tokens in found.tokens.items()} == {("a", 0): 2, ("b", 0): 2}
    backend.unload("other")
    backend.unload("unknown")
    assert list(backend.blocks()) == ["tiny"]
    found.run(backend)
    assert list(found.finishes) == [("a", 0)]

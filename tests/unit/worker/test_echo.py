"""The echo backend: tokens by hash, memory by block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pytest

from llmos.errors import PromptTooLong, Unavailable
from tests.fakes.clock import ManualClock
from worker.backend import Attempt, Blocks, Epoch, FinishReason, ModelSpec, Output, Sampling, Stage, StageDone
from worker.backends.echo import ALPHABET, FIRST_TOKEN, EchoBackend, echo_logprob, echo_token, prompt_digest

PROMPT = tuple(range(40, 60))
SPEC = ModelSpec("echo", "1")
BLOCK_BYTES = 64 * 1024
KNOWN = [94, 83, 49, 72, 117, 94, 60, 65]


def backend(blocks: int = 1000, **options: float) -> EchoBackend:
    made = EchoBackend(clock=ManualClock(), **options)
    made.load(SPEC, blocks * BLOCK_BYTES)
    return made


def attempt(request_id: str = "a", number: int = 1, **fields: object) -> Attempt:
    values: dict[str, object] = {"prompt": PROMPT, "max_tokens": 10, "sampling": Sampling(seed=3), **fields}
    return Attempt(request_id, Epoch(1, number), "echo", **values)  # type: ignore[arg-type]


def run(engine: EchoBackend, steps: int = 10_000) -> list[Output]:
    outputs: list[Output] = []
    for _ in range(steps):
        if not engine.busy():
            break
        outputs.extend(engine.step().outputs)
    return outputs


def tokens(outputs: Iterable[Output], request_id: str = "a") -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for output in outputs:
        if output.request_id == request_id:
            found[output.choice].extend(output.token_ids)
    return dict(found)


def stream(count: int, choice: int = 0, seed: int = 3) -> list[int]:
    return [echo_token(prompt_digest(PROMPT), seed, choice, index) for index in range(count)]


def test_tokens_are_printable_and_depend_on_everything() -> None:
    digest, other = prompt_digest(PROMPT), prompt_digest(PROMPT[:-1])
    base = stream(50)
    assert all(32 <= token <= 126 for token in base)
    assert base != stream(50, seed=4) != stream(50, choice=1)
    assert base != [echo_token(other, 3, 0, index) for index in range(50)]
    assert len(set(base)) > 20
    # Known answers: streams must stay the same from release to release.
    assert [echo_token(digest, 0, 0, index) for index in range(8)] == KNOWN


def test_choices_run_together_to_max_tokens() -> None:
    engine = backend()
    engine.admit(attempt(choices=3))
    outputs = run(engine)
    assert tokens(outputs) == {choice: stream(10, choice) for choice in range(3)}
    assert [output.finish for output in outputs[-3:]] == [FinishReason.LENGTH] * 3
    assert [output.index for output in outputs if output.choice == 1] == list(range(10))


@pytest.mark.parametrize("length", [0, 1, 5, 9])
def test_a_resumed_stream_is_the_undisturbed_one(length: int) -> None:
    engine = backend()
    engine.admit(attempt(number=2, choices=2, resume={0: stream(length), 1: stream(2, 1)}))
    outputs = run(engine)
    assert tokens(outputs) == {0: stream(10)[length:], 1: stream(10, 1)[2:]}
    assert outputs[0].index == length


def test_a_resume_that_is_complete_gives_only_the_finish() -> None:
    engine = backend()
    stop = stream(5)[4]
    engine.admit(attempt("full", resume={0: stream(10)}))
    engine.admit(attempt("stopped", resume={0: stream(5)}, stop_token_ids=frozenset({stop})))
    ends = {output.request_id: (output.index, list(output.token_ids), output.finish) for output in run(engine)}
    assert ends == {"full": (10, [], FinishReason.LENGTH), "stopped": (5, [], FinishReason.STOP)}


def test_finished_choices_are_not_computed_again() -> None:
    engine = backend()
    engine.admit(attempt(choices=2, resume={0: stream(4)}, finished_choices=frozenset({0})))
    assert tokens(run(engine)) == {1: stream(10, 1)}


def test_a_stop_token_ends_and_is_delivered() -> None:
    plain = stream(10)
    stop = plain[6]
    engine = backend()
    engine.admit(attempt(stop_token_ids=frozenset({stop})))
    outputs = run(engine)
    end = plain.index(stop) + 1
    assert tokens(outputs) == {0: plain[:end]}
    assert outputs[-1].finish is FinishReason.STOP


def test_no_stop_token_before_min_tokens() -> None:
    banned = frozenset(stream(10))
    engine = backend()
    engine.admit(attempt(stop_token_ids=banned, min_tokens=6))
    (got,) = tokens(run(engine)).values()
    assert banned.isdisjoint(got[:6])
    assert len(got) > 6
    assert got[6:] == [stream(10)[6]]


def test_logprobs_are_a_distribution_with_the_token_on_top() -> None:
    engine = backend()
    engine.admit(attempt(max_tokens=2, sampling=Sampling(seed=3, logprobs=3)))
    entry = run(engine)[0].logprobs[0]
    assert entry.top[0] == (entry.token_id, entry.logprob)
    assert [logprob for _, logprob in entry.top] == sorted((logprob for _, logprob in entry.top), reverse=True)
    assert len({token for token, _ in entry.top}) == 3
    assert len(echo_logprob(FIRST_TOKEN, 500).top) == ALPHABET
    assert echo_logprob(FIRST_TOKEN, 0).top == []


def test_blocks_grow_with_the_sequence_and_come_back() -> None:
    engine = backend(blocks=10)
    engine.admit(attempt(max_tokens=64 + 30))
    free = []
    while engine.busy():
        engine.step()
        free.append(engine.blocks()["echo"].free)
    # 20 prompt tokens: a second block from the 45th token on, both given back at the end.
    assert free == [9] * 44 + [8] * 49 + [10]


def test_attempts_wait_for_blocks_in_order_of_arrival() -> None:
    engine = backend(blocks=4)
    for name in "abc":
        engine.admit(attempt(name, prompt=tuple(range(100)), max_tokens=20))
    outputs = run(engine)
    first = {name: next(i for i, output in enumerate(outputs) if output.request_id == name) for name in "abc"}
    last = {name: max(i for i, output in enumerate(outputs) if output.request_id == name) for name in "abc"}
    assert first["b"] < last["a"]
    assert first["c"] > max(last["a"], last["b"])
    assert engine.blocks() == {"echo": Blocks(4, 4)}


def test_the_youngest_gives_way_and_comes_back_with_the_same_tokens() -> None:
    engine = backend(blocks=3)
    engine.admit(attempt("old", max_tokens=100))
    engine.admit(attempt("young", max_tokens=100))
    outputs = run(engine)
    assert tokens(outputs, "old") == tokens(outputs, "young") == {0: stream(100)}
    end_of_old = max(i for i, output in enumerate(outputs) if output.request_id == "old")
    pauses = [i for i, output in enumerate(outputs) if output.request_id == "young" and i > end_of_old]
    assert pauses, "the younger one must have waited for the older one"
    assert engine.blocks()["echo"].free == 3


def test_what_can_never_fit_is_refused_at_once() -> None:
    engine = backend(blocks=3)
    with pytest.raises(Unavailable):
        engine.admit(attempt(max_tokens=200))
    with pytest.raises(PromptTooLong):
        engine.admit(attempt(max_tokens=8192))
    with pytest.raises(Unavailable):
        engine.admit(Attempt("x", Epoch(1, 1), "other", PROMPT, 4))
    assert not engine.busy()


def test_declared_weights_leave_less_for_blocks() -> None:
    engine = EchoBackend()
    assert engine.load(ModelSpec("heavy", "1", weight_bytes=6 * BLOCK_BYTES), 10 * BLOCK_BYTES).total == 4
    with pytest.raises(Unavailable):
        engine.load(ModelSpec("vast", "1", weight_bytes=40 << 30), 24 << 30)


def test_epochs_order_attempts() -> None:
    engine = backend()
    engine.admit(attempt(number=2))
    engine.admit(attempt(number=2, max_tokens=1))
    engine.admit(attempt(number=1, max_tokens=1))
    engine.step()
    engine.admit(attempt(number=3, resume={0: stream(1)}))
    outputs = run(engine)
    assert {output.epoch.attempt for output in outputs} == {3}
    assert tokens(outputs) == {0: stream(10)[1:]}


def test_cancel_is_immediate_and_idempotent() -> None:
    engine = backend(blocks=50)
    engine.admit(attempt(choices=2))
    engine.step()
    engine.cancel("a")
    engine.cancel("a")
    engine.cancel("never")
    assert not engine.busy()
    assert engine.blocks()["echo"].free == 50


def test_keep_until_ends_a_choice_once_it_is_reached() -> None:
    engine = backend(blocks=50)
    engine.admit(attempt(choices=2))
    engine.step()
    engine.cancel("a", 0, 4)
    engine.cancel("a", 1, 1)
    assert tokens(run(engine)) == {0: stream(4)[1:]}
    assert engine.blocks()["echo"].free == 50


def test_pacing_gives_every_stream_a_token_per_tick() -> None:
    clock = ManualClock()
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        clock.advance(seconds)

    engine = EchoBackend(tokens_per_second=10, clock=clock, sleep=sleep)
    engine.load(SPEC, 1000 * BLOCK_BYTES)
    engine.admit(attempt("a", max_tokens=5))
    engine.admit(attempt("b", max_tokens=5))
    start = clock.monotonic()
    ticks = [[output.request_id for output in engine.step().outputs] for _ in range(40)]
    assert [tick for tick in ticks if tick] == [["a", "b"]] * 5
    assert clock.monotonic() - start == pytest.approx(0.4)
    assert max(naps) <= 0.02


def test_stages_tell_prefill_from_decode() -> None:
    engine = backend()
    engine.admit(attempt(max_tokens=3, choices=2))
    stages: list[StageDone] = []
    while engine.busy():
        stages.extend(engine.step().stages)
    assert [(stage.stage, stage.tokens) for stage in stages] == [(Stage.PREFILL, 20), (Stage.DECODE, 6)]
    assert stages[0].end_s <= stages[1].start_s


def test_unload_forgets_the_model_and_its_attempts() -> None:
    engine = backend()
    engine.admit(attempt())
    engine.unload("echo")
    engine.unload("echo")
    assert not engine.busy()
    assert engine.blocks() == {}
    assert engine.step().outputs == ()

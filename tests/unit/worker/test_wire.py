"""Messages to values and back."""

from __future__ import annotations

import pytest

from llmos.internal.v1 import request_pb2, work_pb2
from llmos.v1 import fleet_pb2, inference_pb2
from worker import wire
from worker.backend import (
    Attempt,
    Blocks,
    Epoch,
    Failure,
    FinishReason,
    ModelSpec,
    Output,
    Sampling,
    Stage,
    StageDone,
    TokenLogprob,
)


def test_a_dispatch_becomes_an_attempt() -> None:
    request = request_pb2.Request(
        request_id="a",
        model="m",
        token_ids=[1, 2, 3],
        sampling=request_pb2.Sampling(
            temperature=0.5,
            top_p=0.25,
            top_k=40,
            min_p=0.125,
            presence_penalty=1.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.25,
            logit_bias={7: -100.0},
            seed=2**63 + 1,
            logprobs=5,
        ),
        max_tokens=9,
        min_tokens=2,
        choices=2,
        stop_token_ids=[4, 5],
        ignore_eos=True,
        resume=[
            request_pb2.ChoiceResume(choice=0, token_ids=[8, 9]),
            request_pb2.ChoiceResume(choice=1, token_ids=[8], finished=True),
        ],
    )
    dispatch = work_pb2.Dispatch(epoch=request_pb2.Epoch(term=7, attempt=3), request=request)
    sampling = Sampling(0.5, 40, 0.25, 0.125, 1.5, -0.5, 1.25, {7: -100.0}, 2**63 + 1, 5)
    assert wire.attempt_from_wire(dispatch) == Attempt(
        request_id="a",
        epoch=Epoch(7, 3),
        model="m",
        prompt=(1, 2, 3),
        max_tokens=9,
        choices=2,
        sampling=sampling,
        stop_token_ids=frozenset({4, 5}),
        min_tokens=2,
        ignore_eos=True,
        resume={0: (8, 9), 1: (8,)},
        finished_choices=frozenset({1}),
    )


@pytest.mark.parametrize(("message", "logprobs"), [({}, None), ({"logprobs": 0}, 0), ({"logprobs": 3}, 3)])
def test_no_logprobs_differs_from_none_but_the_chosen(message: dict[str, int], logprobs: int | None) -> None:
    request = request_pb2.Request(sampling=request_pb2.Sampling(**message))
    assert wire.attempt_from_wire(work_pb2.Dispatch(request=request)).sampling.logprobs == logprobs


def on_the_wire(output: Output) -> request_pb2.Output:
    frame = work_pb2.WorkFrame()
    wire.add_output(frame, output)
    return frame.outputs[0]


def test_an_output_survives_the_wire() -> None:
    entry = TokenLogprob(65, -0.5, [(65, -0.5), (66, -1.5)])
    sent = on_the_wire(Output("a", Epoch(7, 3), 1, 4, [65], [entry], FinishReason.STOP))
    got = request_pb2.Output.FromString(sent.SerializeToString())
    assert (got.request_id, wire.epoch_from_wire(got.epoch), got.choice, got.index) == ("a", Epoch(7, 3), 1, 4)
    assert list(got.token_ids) == [65]
    assert got.finish_reason == inference_pb2.FINISH_REASON_STOP
    (logprob,) = got.logprobs
    assert (logprob.token_id, logprob.logprob) == (65, -0.5)
    assert list(zip(logprob.top_token_ids, logprob.top_logprobs, strict=True)) == [(65, -0.5), (66, -1.5)]


def test_values_and_cached_tokens_survive_the_wire() -> None:
    got = on_the_wire(Output("a", Epoch(1, 1), 0, 0, [], values=[0.5, 1.5], cached_tokens=64))
    assert (list(got.values), got.cached_tokens, list(got.token_ids)) == ([0.5, 1.5], 64, [])


@pytest.mark.parametrize(
    ("finish", "reason"),
    [(None, inference_pb2.FINISH_REASON_UNSPECIFIED), (FinishReason.LENGTH, inference_pb2.FINISH_REASON_LENGTH)],
)
def test_finish_reasons(finish: FinishReason | None, reason: inference_pb2.FinishReason) -> None:
    assert on_the_wire(Output("a", Epoch(1, 1), 0, 0, [65], finish=finish)).finish_reason == reason


def test_a_failure_keeps_its_code() -> None:
    failure = wire.failure_to_wire(Failure("a", Epoch(1, 2), "attempt_lost", "Gone."))
    assert (failure.request_id, failure.code, failure.message) == ("a", "attempt_lost", "Gone.")
    assert wire.epoch_from_wire(failure.epoch) == Epoch(1, 2)


def test_a_stage_names_its_attempt_and_its_times() -> None:
    span = wire.stage_to_wire(StageDone("a", Epoch(7, 3), Stage.PREFILL, 10.5, 11.25, 42))
    assert (span.name, span.start_unix_ns, span.end_unix_ns) == ("engine.prefill", 10_500_000_000, 11_250_000_000)
    assert wire.stage_epoch(span) == ("a", Epoch(7, 3))
    assert span.attributes[wire.TOKENS] == "42"


def test_a_loaded_model_shows_its_blocks() -> None:
    model = wire.loaded_to_wire(ModelSpec("m", "v"), Blocks(10, 4))
    assert model == fleet_pb2.NodeModel(
        name="m", version="v", state=fleet_pb2.MODEL_STATE_LOADED, total_blocks=10, free_blocks=4
    )

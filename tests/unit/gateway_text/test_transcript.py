"""Only the next index under the highest epoch is taken; everything else leaves no trace."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.text.choice import ChoiceText
from gateway.text.tokenizer import ByteTokenizer
from gateway.transcript import Shape, Transcript, Verdict
from gateway.types import Delta, Progress
from llmos.errors import InvalidRequest
from llmos.internal.v1 import request_pb2
from llmos.v1.inference_pb2 import FinishReason
from tests.fakes.scheduler import LENGTH, STOP, output

TOKENIZER = ByteTokenizer()


def transcript(
    *, choices: int = 1, max_tokens: int = 20, stops: Sequence[str] = (), logprobs: bool = False
) -> Transcript:
    return Transcript(
        Shape(choices, max_tokens, 256, logprobs),
        lambda: ChoiceText(TOKENIZER.detokenizer(continuation=False), stops),
        TOKENIZER.token_bytes,
    )


def delta(subject: Transcript, piece: request_pb2.Output) -> Delta:
    taken = subject.take(piece)
    assert taken.verdict is Verdict.TAKEN
    assert taken.delta is not None
    return taken.delta


def test_the_next_piece_is_taken() -> None:
    subject = transcript()
    assert delta(subject, output("r", 0, "ab")) == Delta(0, 0, "ab", (97, 98))
    assert delta(subject, output("r", 2, "c", finish=STOP)) == Delta(0, 2, "c", (99,), (), "stop")
    assert subject.finished
    assert subject.completion_tokens == 3


def test_a_repeated_piece_is_dropped_and_a_longer_one_trimmed() -> None:
    subject = transcript()
    subject.take(output("r", 0, "ab"))
    assert subject.take(output("r", 0, "ab")).verdict is Verdict.DUPLICATE
    assert subject.take(output("r", 1, "b")).verdict is Verdict.DUPLICATE
    assert delta(subject, output("r", 1, "bc")) == Delta(0, 2, "c", (99,))


def test_a_gap_is_not_taken() -> None:
    subject = transcript()
    assert subject.take(output("r", 1, "b")).verdict is Verdict.GAP
    assert subject.completion_tokens == 0


def test_a_lower_epoch_is_stale_whatever_it_says() -> None:
    subject = transcript()
    subject.take(output("r", 0, "a", epoch=(2, 3)))
    for epoch in ((1, 9), (2, 2)):
        assert subject.take(output("r", 1, "x", epoch=epoch)).verdict is Verdict.STALE
    assert delta(subject, output("r", 1, "b", epoch=(3, 1))).text == "b"
    assert subject.epoch == (3, 1)


def test_only_the_first_attempt_tells_how_much_was_cached() -> None:
    subject = transcript(choices=2)
    for number, cached in ((1, 0), (0, 128)):
        piece = output("r", 0, "a", choice=number)
        piece.cached_tokens = cached
        subject.take(piece)
    later = output("r", 1, "b", epoch=(1, 2))
    later.cached_tokens = 192
    subject.take(later)
    assert subject.cached_tokens == 128


def test_an_output_that_is_not_taken_raises_no_fence() -> None:
    subject = transcript()
    subject.take(output("r", 5, "x", epoch=(9, 9)))
    assert delta(subject, output("r", 0, "a", epoch=(1, 1))).text == "a"


@pytest.mark.parametrize(
    "piece",
    [
        output("r", 0, "a", choice=1),
        output("r", 0, [256]),
        output("r", 0, "a" * 21),
        output("r", 20, "a"),
        output("r", 0, ""),
        output("r", 0, "a", finish=77),
        output("r", 0, "a", logprobs=[request_pb2.LogprobEntry(token_id=97)]),
    ],
)
def test_what_contradicts_the_request_is_corrupt(piece: request_pb2.Output) -> None:
    subject = transcript()
    assert subject.take(piece).verdict is Verdict.CORRUPT
    assert subject.completion_tokens == 0


def test_a_finish_may_come_by_itself() -> None:
    subject = transcript()
    subject.take(output("r", 0, "a"))
    assert delta(subject, output("r", 1, "", finish=LENGTH)) == Delta(0, 1, "", (), (), "length")
    assert subject.take(output("r", 1, "", finish=LENGTH)).verdict is Verdict.DUPLICATE


def test_a_stop_string_ends_the_choice_before_its_producer_does() -> None:
    subject = transcript(stops=["END"])
    assert delta(subject, output("r", 0, "abE")).text == "ab"
    taken = subject.take(output("r", 3, "NDxyz"))
    assert taken.keep_until == 5
    assert taken.delta == Delta(0, 3, "", (78, 68), (), "stop")
    assert subject.completion_tokens == 5


def test_a_stop_string_in_the_last_token_needs_no_word_upwards() -> None:
    subject = transcript(stops=["c"])
    taken = subject.take(output("r", 0, "abc", finish=LENGTH))
    assert taken.keep_until is None
    assert taken.delta == Delta(0, 0, "ab", (97, 98, 99), (), "stop")


def test_held_text_comes_with_the_finish() -> None:
    subject = transcript(stops=["END"])
    assert delta(subject, output("r", 0, "aE")).text == "a"
    assert delta(subject, output("r", 2, "N", finish=LENGTH)).text == "EN"


def test_logprobs_come_with_their_tokens() -> None:
    entry = request_pb2.LogprobEntry(token_id=97, logprob=-0.5, top_token_ids=[97, 195], top_logprobs=[-0.5, -1.5])
    got = delta(transcript(logprobs=True), output("r", 0, "a", logprobs=[entry])).logprobs[0]
    assert (got.text, got.raw, got.logprob) == ("a", b"a", -0.5)
    assert [(other.token_id, other.text, other.raw) for other in got.top] == [(97, "a", b"a"), (195, "�", b"\xc3")]


def test_logprobs_of_skipped_and_unwanted_tokens_go_with_them() -> None:
    subject = transcript(stops=["c"], logprobs=True)
    entries = [request_pb2.LogprobEntry(token_id=byte) for byte in b"abcd"]
    subject.take(output("r", 0, "a", logprobs=entries[:1]))
    got = delta(subject, output("r", 0, "abcd", logprobs=entries))
    assert [entry.token_id for entry in got.logprobs] == [98, 99]


def test_resuming_delivers_only_what_the_client_lacks() -> None:
    subject = transcript(choices=2)
    assert subject.resume([Progress(0, tuple(b"abc"), 1), Progress(1, (120,), 1)]) == [Delta(0, 3, "bc", ())]
    assert delta(subject, output("r", 3, "d")).text == "d"
    assert [(part.choice, list(part.token_ids)) for part in subject.resume_state()] == [(0, [*b"abcd"]), (1, [120])]


def test_a_choice_that_had_ended_stays_ended() -> None:
    subject = transcript()
    assert subject.resume([Progress(0, (97,), 1, finished=True)]) == []
    assert subject.finished


@pytest.mark.parametrize(("text", "finish", "said"), [("ab", LENGTH, LENGTH), ("ac", LENGTH, STOP), ("ab", STOP, STOP)])
def test_a_scheduler_is_told_why_a_choice_ended(text: str, finish: FinishReason, said: FinishReason) -> None:
    subject = transcript(choices=2, stops=["c"])
    subject.take(output("r", 0, text, finish=finish))
    assert [(part.finished, part.finish_reason) for part in subject.resume_state()] == [(True, said)]


def test_a_stop_string_in_the_tokens_held_ends_the_choice() -> None:
    subject = transcript(stops=["b"])
    assert subject.resume([Progress(0, (97, 98), 1)]) == [Delta(0, 2, "", (), (), "stop")]
    assert subject.finished


def test_a_choice_that_holds_all_its_tokens_has_ended() -> None:
    subject = transcript(max_tokens=2)
    assert subject.resume([Progress(0, (97, 98), 2)]) == [Delta(0, 2, "", (), (), "length")]


@pytest.mark.parametrize(
    "progress",
    [
        [Progress(1, (97,), 1)],
        [Progress(0, (97,), 2)],
        [Progress(0, (300,), 1)],
        [Progress(0, (97,) * 21, 1)],
        [Progress(0, (97,), 1), Progress(0, (97,), 1)],
    ],
)
def test_progress_that_contradicts_the_request_is_refused(progress: list[Progress]) -> None:
    with pytest.raises(InvalidRequest):
        transcript().resume(progress)


@given(st.data())
def test_whatever_arrives_the_text_is_the_same(data: st.DataObject) -> None:
    """Pieces repeated, overlapping, out of order and of old epochs: what is delivered is a prefix, then the whole."""
    text = data.draw(st.text(alphabet="aé世", min_size=1, max_size=12))
    tokens = list(text.encode())
    subject = transcript(max_tokens=len(tokens))
    got = ""
    for _ in range(data.draw(st.integers(0, 20))):
        start = data.draw(st.integers(0, len(tokens) - 1))
        end = data.draw(st.integers(start + 1, len(tokens)))
        epoch = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
        finish = LENGTH if end == len(tokens) else 0
        taken = subject.take(output("r", start, tokens[start:end], epoch=epoch, finish=finish))
        got += taken.delta.text if taken.delta else ""
        assert text.startswith(got)
    if not subject.finished:
        have = subject.completion_tokens
        got += delta(subject, output("r", have, tokens[have:], epoch=(3, 1), finish=LENGTH)).text
    assert got == text

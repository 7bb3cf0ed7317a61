"""Whatever the fleet remembers and wherever a client's stream broke: the events that it gets are those it lacks."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import validate
from gateway.http.event_encoder import EventEncoder
from gateway.http.shapes import Shape, shape_of
from gateway.remainder import Remainder
from gateway.text.choice import ChoiceText
from gateway.text.tokenizer import ByteTokenizer
from gateway.transcript import Shape as Bounds
from gateway.transcript import Transcript
from gateway.types import Delta, Held, Started, View
from gateway.vault import Recipe, Unreadable, Vault, read_keys
from llmos.errors import ConfigError, InternalError, InvalidRequest
from llmos.internal.v1 import journal_pb2, request_pb2
from tests.fakes.scheduler import LENGTH, STOP, output

TOKENIZER = ByteTokenizer()
CHOICES = 2
STARTED = Started("req-1", "m", "v1", 7, 1_700_000_000, 3)
TEXTS = st.text("aé€.", min_size=1, max_size=12).map(str.encode) | st.binary(min_size=1, max_size=12)


def transcript(stops: tuple[str, ...], logprobs: bool, max_tokens: int = 40) -> Transcript:
    return Transcript(
        Bounds(CHOICES, max_tokens, 256, logprobs),
        lambda: ChoiceText(TOKENIZER.detokenizer(continuation=False), stops),
        TOKENIZER.token_bytes,
    )


def entries(tokens: bytes, wanted: bool) -> list[request_pb2.LogprobEntry]:
    return [request_pb2.LogprobEntry(token_id=token, logprob=-token) for token in tokens] if wanted else []


def piece(choice: int, index: int, tokens: bytes, last: bool, wanted: bool) -> request_pb2.Output:
    finish = (LENGTH if choice else STOP) if last else 0
    return output("r", index, tokens, choice=choice, finish=finish, logprobs=entries(tokens, wanted))


def singly(texts: list[bytes], begin: list[int], wanted: bool) -> list[request_pb2.Output]:
    """What the fleet sends from there on, choices in turn, a token at a time."""
    pieces = []
    for index in range(max(map(len, texts))):
        for choice, text in enumerate(texts):
            if begin[choice] <= index < len(text):
                pieces.append(piece(choice, index, text[index : index + 1], index + 1 == len(text), wanted))
    return pieces


def events_of(shape: Shape, encoder: EventEncoder, delta: Delta | None) -> list[bytes]:
    data = encoder.encode(delta) if delta is not None else b""
    return [event + b"\n\n" for event in data.split(b"\n\n") if event]


def new_shape(logprobs: bool, kind: str = "chat") -> Shape:
    shape = shape_of(kind, View(logprobs=logprobs))
    shape.start(STARTED)
    return shape


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(TEXTS, min_size=CHOICES, max_size=CHOICES),
    stops=st.sampled_from([(), (".",), ("é.", "aa")]),
    logprobs=st.booleans(),
    data=st.data(),
)
def test_the_events_after_the_last_one_come_and_no_others(
    texts: list[bytes], stops: tuple[str, ...], logprobs: bool, data: st.DataObject
) -> None:
    shape = new_shape(logprobs)
    encoder, undisturbed = EventEncoder(shape), transcript(stops, logprobs)
    events: list[bytes] = []
    for one in singly(texts, [0] * CHOICES, logprobs):
        events += events_of(shape, encoder, undisturbed.take(one).delta)
    seen = data.draw(st.integers(0, len(events)), label="events seen")
    held = validate.last_event_id(last_id(events[:seen]))

    known = [data.draw(st.integers(0, len(text)), label="known") for text in texts]
    lacking = [data.draw(st.integers(0, count), label="without log-probabilities") for count in known]
    again, remainder = transcript(stops, logprobs), Remainder(held, CHOICES, 40)
    shape = new_shape(logprobs)
    shape.take_up(held)
    encoder = EventEncoder(shape)
    rest: dict[int, list[bytes]] = {0: [], 1: []}
    for choice, text in enumerate(texts):
        said = journal_pb2.JournalChoice(
            choice=choice,
            token_ids=text[: known[choice]],
            logprobs=entries(text[lacking[choice] : known[choice]], logprobs),
            finished=known[choice] == len(text),
            finish_reason=(LENGTH if choice else STOP) if known[choice] == len(text) else 0,
        )
        for delta in again.replay(said, remainder.tokens_of(choice)):
            rest[choice] += events_of(shape, encoder, remainder.cut(delta))
    have = {part.choice: len(part.token_ids) for part in again.resume_state()}
    for one in singly(texts, [have.get(choice, 0) for choice in range(CHOICES)], logprobs):
        taken = again.take(one).delta
        if taken is not None:
            rest[one.choice] += events_of(shape, encoder, remainder.cut(taken))
    for choice in range(CHOICES):
        missed = [event for event in events[seen:] if f'"index":{choice},'.encode() in event]
        assert list(map(payload, rest[choice])) == list(map(payload, missed))
    assert again.finished
    assert again.completion_tokens == undisturbed.completion_tokens


def last_id(events: list[bytes]) -> str:
    ids = [line for event in events for line in event.decode().split("\n") if line.startswith("id: ")]
    return ids[-1].removeprefix("id: ") if ids else ""


def payload(event: bytes) -> bytes:
    return event.partition(b"data: ")[2]


def test_the_id_says_all_that_the_client_has_also_of_choices_that_are_over() -> None:
    shape = new_shape(False, "completion")
    shape.take_up((Held(1, 4, 3, True),))
    encoder = EventEncoder(shape)
    data = encoder.encode(Delta(0, 0, "ab", (97, 98), parts=("a", "b")))
    assert data.startswith(b"id: 0:1:1,1:4:3:end\n")
    assert b"id: 0:2:2,1:4:3:end\n" in data
    assert encoder.encode(Delta(0, 2, "", (), (), "stop")).startswith(b"id: 0:2:2:end,1:4:3:end\n")


@pytest.mark.parametrize("held", [[Held(2, 1, 1)], [Held(0, 41, 1)], [Held(0, 1, 1), Held(0, 2, 2)]])
def test_nobody_holds_what_never_was(held: list[Held]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Remainder(held, CHOICES, 40)
    assert refused.value.param == "last-event-id"


@pytest.mark.parametrize(
    "text", ["0:1", "a:b:c", "0:1:1;1:1:1", "0:1:1:over", "0:-1:1", ",", "0:1:1," * 20, "1" * 2000]
)
def test_an_id_that_no_event_has_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        validate.last_event_id(text)


def test_what_contradicts_its_request_is_a_bug_and_no_output() -> None:
    for said in ({"choice": 2}, {"token_ids": [97] * 41}, {"token_ids": [256]}):
        with pytest.raises(InternalError):
            transcript((), False).replay(journal_pb2.JournalChoice(**said), 0)  # type: ignore[arg-type]


RECIPE = Recipe(STARTED, "chat", "hash", 256, ("stop",), "response_format", View(tier="flex"))


def test_only_gateways_with_a_key_open_it_and_only_for_its_request(tmp_path: object) -> None:
    old, new = secrets.token_bytes(32), secrets.token_bytes(32)
    blob = Vault([old]).seal(RECIPE, "t", "req-1")
    assert b"stop" not in blob
    assert Vault([new, old]).open(blob, "t", "req-1") == RECIPE
    for keys, tenant, request_id in (
        ([new], "t", "req-1"),
        ([old], "u", "req-1"),
        ([old], "t", "req-2"),
        ((), "t", "x"),
    ):
        with pytest.raises(Unreadable):
            Vault(keys).open(blob, tenant, request_id)
    for damaged in (blob[:-1], b"", blob[:5], bytes([blob[0] ^ 1]) + blob[1:]):
        with pytest.raises(Unreadable):
            Vault([old]).open(damaged, "t", "req-1")
    assert Vault([new]).seal(replace(RECIPE, view=None), "t", "r") != Vault([new]).seal(RECIPE, "t", "r")


def test_a_key_file_has_keys_or_is_refused(tmp_path: pytest.TempPathFactory) -> None:
    file = tmp_path / "keys"  # type: ignore[operator]
    file.write_text("ab" * 32 + "\n" + "cd" * 32 + "\n")
    assert read_keys(file) == [b"\xab" * 32, b"\xcd" * 32]
    for content in ("", "ab", "no key"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="openssl rand"):
            read_keys(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(file.with_name("none"))

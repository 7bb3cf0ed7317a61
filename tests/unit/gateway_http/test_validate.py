"""The validator's verdicts, field by field."""

from __future__ import annotations

import math

import pytest

from gateway.schemas import MAX_TEXT_CHARS
from gateway.types import Params, Progress, Turn
from gateway.validate import (
    IGNORED_FIELDS,
    chat_request,
    completion_request,
    completion_requests,
    request_id,
    timeout_s,
)
from llmos.errors import InvalidRequest, LlmosError, PayloadTooLarge, UnsupportedFeature

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: object) -> dict[str, object]:
    return {"model": "tiny", "messages": HELLO, **fields}


def completion(**fields: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": "once", **fields}


def test_defaults_are_those_of_openai() -> None:
    request = chat_request(chat())
    assert request.kind == "chat"
    assert request.turns == (Turn("user", "hello"),)
    assert request.params == Params()
    assert request.text is None
    assert request.token_ids is None


def test_every_parameter_arrives() -> None:
    body = chat(
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "4294967295": 1.5},
        seed=2**64 - 1,
        stop=["a", "b"],
        stop_token_ids=[1, 2],
        min_tokens=3,
        ignore_eos=True,
        n=4,
        logprobs=True,
        top_logprobs=20,
    )
    assert chat_request(body).params == Params(
        max_tokens=7,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
        logit_bias={5: -100, 4294967295: 1.5},
        seed=2**64 - 1,
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        min_tokens=3,
        ignore_eos=True,
        n=4,
        logprobs=20,
    )


def test_null_means_not_given() -> None:
    names = ("max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "n", "logit_bias", "logprobs", "tools")
    assert chat_request(chat(**dict.fromkeys(names))).params == Params()


@pytest.mark.parametrize(
    ("given", "kept"), [("x", ("x",)), (["x", "y"], ("x", "y")), ([], ()), (None, ()), ("x" * 256, ("x" * 256,))]
)
def test_stop_is_a_text_or_a_list(given: object, kept: tuple[str, ...]) -> None:
    assert chat_request(chat(stop=given)).params.stop == kept


@pytest.mark.parametrize(("given", "kept"), [(0, 0), (-1, 2**64 - 1), (-(2**63), 2**63), (2**64 - 1, 2**64 - 1)])
def test_seeds_are_taken_modulo_two_to_the_64(given: int, kept: int) -> None:
    assert chat_request(chat(seed=given)).params.seed == kept


def test_chat_logprobs_without_top_report_the_chosen_token_only() -> None:
    assert chat_request(chat(logprobs=True)).params.logprobs == 0
    assert chat_request(chat(logprobs=False)).params.logprobs is None


def test_content_may_be_a_list_of_texts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat_request({"model": "m", "messages": [{"role": "developer", "content": parts}]})
    assert request.turns == (Turn("system", "ab"),)


def test_an_answer_of_the_api_can_be_sent_back() -> None:
    answer = {
        "role": "assistant",
        "content": "hi",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert chat_request(chat(messages=[*HELLO, answer])).turns[1] == Turn("assistant", "hi")


@pytest.mark.parametrize("name", sorted(IGNORED_FIELDS))
def test_fields_without_effect_are_accepted(name: str) -> None:
    assert chat_request(chat(**{name: "anything"})) == chat_request(chat())
    assert completion_request(completion(**{name: {"any": ["thing"]}})) == completion_request(completion())


@pytest.mark.parametrize(
    "body",
    [
        chat(response_format={"type": "text"}),
        chat(tools=[], tool_choice="auto", modalities=["text"]),
        completion(best_of=2, n=2, echo=False, suffix=""),
        completion(best_of=1),
    ],
)
def test_features_not_asked_for_are_no_obstacle(body: dict[str, object]) -> None:
    assert (chat_request(body) if "messages" in body else completion_request(body)).model == "tiny"


BAD_CHAT: list[tuple[dict[str, object], type[LlmosError], str | None]] = [
    ({"messages": HELLO}, InvalidRequest, "model"),
    ({"model": "m"}, InvalidRequest, "messages"),
    (chat(model=""), InvalidRequest, "model"),
    (chat(model="m" * 257), InvalidRequest, "model"),
    (chat(model=None), InvalidRequest, "model"),
    (chat(messages=[]), InvalidRequest, "messages"),
    (chat(messages=HELLO * 1025), InvalidRequest, "messages"),
    (chat(messages="hello"), InvalidRequest, "messages"),
    (chat(messages=["hello"]), InvalidRequest, "messages[0]"),
    (chat(messages=[{"content": "x"}]), InvalidRequest, "messages[0].role"),
    (chat(messages=[*HELLO, {"role": "robot", "content": "x"}]), InvalidRequest, "messages[1].role"),
    (chat(messages=[{"role": "user"}]), InvalidRequest, "messages[0].content"),
    (chat(messages=[{"role": "user", "content": None}]), InvalidRequest, "messages[0].content"),
    (chat(messages=[{"role": "user", "content": 5}]), InvalidRequest, "messages[0].content"),
    (chat(messages=[{"role": "user", "content": ["x"]}]), InvalidRequest, "messages[0].content[0]"),
    (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), InvalidRequest, "messages[0].content"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        UnsupportedFeature,
        "messages[0].content[0]",
    ),
    (
        chat(messages=[{"role": "user", "content": [{"type": "text", "txt": "x"}]}]),
        InvalidRequest,
        "messages[0].content[0].txt",
    ),
    (chat(messages=[{"role": "user", "content": "x", "nmae": "y"}]), InvalidRequest, "messages[0].nmae"),
    (
        chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
        UnsupportedFeature,
        "messages[0].tool_calls",
    ),
    (chat(temperature=2.01), InvalidRequest, "temperature"),
    (chat(temperature=-0.01), InvalidRequest, "temperature"),
    (chat(temperature="1"), InvalidRequest, "temperature"),
    (chat(temperature=True), InvalidRequest, "temperature"),
    (chat(temperature=math.nan), InvalidRequest, "temperature"),
    (chat(temperature=math.inf), InvalidRequest, "temperature"),
    (chat(temperature=10**400), InvalidRequest, "temperature"),
    (chat(top_p=0), InvalidRequest, "top_p"),
    (chat(top_p=1e-60), InvalidRequest, "top_p"),
    (chat(top_p=1.1), InvalidRequest, "top_p"),
    (chat(top_k=-2), InvalidRequest, "top_k"),
    (chat(top_k=2**32), InvalidRequest, "top_k"),
    (chat(top_k=1.5), InvalidRequest, "top_k"),
    (chat(min_p=1.1), InvalidRequest, "min_p"),
    (chat(presence_penalty=2.1), InvalidRequest, "presence_penalty"),
    (chat(frequency_penalty=-2.1), InvalidRequest, "frequency_penalty"),
    (chat(repetition_penalty=0), InvalidRequest, "repetition_penalty"),
    (chat(repetition_penalty=1e-60), InvalidRequest, "repetition_penalty"),
    (chat(repetition_penalty=10.1), InvalidRequest, "repetition_penalty"),
    (chat(logit_bias={"1": 100.1}), InvalidRequest, "logit_bias[...]"),
    (chat(logit_bias={"x": 1}), InvalidRequest, "logit_bias.x"),
    (chat(logit_bias={"01": 1}), InvalidRequest, "logit_bias.01"),
    (chat(logit_bias={"4294967296": 1}), InvalidRequest, "logit_bias.4294967296"),
    (chat(logit_bias={"-1": 1}), InvalidRequest, "logit_bias.-1"),
    (chat(logit_bias={str(n): 0 for n in range(1025)}), InvalidRequest, "logit_bias"),
    (chat(logit_bias=[]), InvalidRequest, "logit_bias"),
    (chat(seed=2**64), InvalidRequest, "seed"),
    (chat(seed=-(2**63) - 1), InvalidRequest, "seed"),
    (chat(seed=1.5), InvalidRequest, "seed"),
    (chat(stop=["a"] * 5), InvalidRequest, "stop"),
    (chat(stop=[""]), InvalidRequest, "stop[0]"),
    (chat(stop="x" * 257), InvalidRequest, "stop"),
    (chat(stop=[1]), InvalidRequest, "stop[0]"),
    (chat(stop_token_ids=[0] * 65), InvalidRequest, "stop_token_ids"),
    (chat(stop_token_ids=[-1]), InvalidRequest, "stop_token_ids[0]"),
    (chat(max_tokens=0), InvalidRequest, "max_tokens"),
    (chat(max_tokens=2**32), InvalidRequest, "max_tokens"),
    (chat(max_tokens=10**30), InvalidRequest, "max_tokens"),
    (chat(max_tokens=1, max_completion_tokens=1), InvalidRequest, "max_completion_tokens"),
    (chat(min_tokens=2, max_tokens=1), InvalidRequest, "min_tokens"),
    (chat(ignore_eos=1), InvalidRequest, "ignore_eos"),
    (chat(n=0), InvalidRequest, "n"),
    (chat(n=17), InvalidRequest, "n"),
    (chat(logprobs=1), InvalidRequest, "logprobs"),
    (chat(top_logprobs=1), InvalidRequest, "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), InvalidRequest, "top_logprobs"),
    (chat(stream="yes"), InvalidRequest, "stream"),
    (chat(stream_options={"include_usage": True}), InvalidRequest, "stream_options"),
    (chat(stream=True, stream_options=[]), InvalidRequest, "stream_options"),
    (chat(tools=[{"type": "function"}]), UnsupportedFeature, "tools"),
    (chat(tool_choice={"type": "function"}), UnsupportedFeature, "tool_choice"),
    (chat(modalities=["text", "audio"]), UnsupportedFeature, "modalities"),
    (chat(functions=[{}]), UnsupportedFeature, "functions"),
    (chat(temprature=1), InvalidRequest, "temprature"),
    (chat(prompt="x"), InvalidRequest, "prompt"),
    (chat(resume=[{"choice": 1, "token_ids": [1]}], seed=1), InvalidRequest, "resume"),
    (chat(resume=[{"choice": 0}, {"choice": 0}], seed=1), InvalidRequest, "resume"),
    (chat(resume=[{"choice": 0}]), InvalidRequest, "seed"),
    (chat(resume=[{"choice": 16}], seed=1), InvalidRequest, "resume[0].choice"),
    (chat(resume_request_id="x" * 129), InvalidRequest, "resume_request_id"),
]


@pytest.mark.parametrize(("body", "kind", "param"), BAD_CHAT)
def test_a_bad_chat_body_is_refused_by_name(body: dict[str, object], kind: type[LlmosError], param: str) -> None:
    with pytest.raises(kind) as caught:
        chat_request(body)
    assert type(caught.value) is kind
    assert caught.value.param == param
    assert caught.value.message.endswith((".", "?"))


def test_a_misspelt_field_is_answered_with_the_right_one() -> None:
    with pytest.raises(InvalidRequest, match="Did you mean 'temperature'"):
        chat_request(chat(temprature=1))


def test_text_is_bounded_as_a_whole() -> None:
    half = {"role": "user", "content": "x" * (MAX_TEXT_CHARS // 2)}
    assert chat_request(chat(messages=[half, half])).turns
    with pytest.raises(PayloadTooLarge):
        chat_request(chat(messages=[half, half, *HELLO]))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [("a", None)]),
        ([1, 2], [(None, (1, 2))]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([[1], [2, 3]], [(None, (1,)), (None, (2, 3))]),
    ],
)
def test_prompts(prompt: object, expected: list[tuple[str | None, tuple[int, ...] | None]]) -> None:
    requests = completion_requests(completion(prompt=prompt))
    assert [(request.text, request.token_ids) for request in requests] == expected


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""], ["a", 1], [1, [2]], [-1], [2**32], [True], None, 5])
def test_bad_prompts(prompt: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion_requests(completion(prompt=prompt))
    assert (caught.value.param or "").startswith("prompt")


@pytest.mark.parametrize(
    "fields",
    [{"best_of": 3}, {"best_of": 3, "n": 2}, {"echo": True}, {"suffix": "x"}],
)
def test_completion_features_that_are_not_offered(fields: dict[str, object]) -> None:
    with pytest.raises(UnsupportedFeature):
        completion_requests(completion(**fields))


def test_too_many_prompts_and_prompts_where_one_is_possible() -> None:
    assert len(completion_requests(completion(prompt=["a"] * 16))) == 16
    with pytest.raises(InvalidRequest):
        completion_requests(completion(prompt=["a"] * 17))
    with pytest.raises(InvalidRequest):
        completion_request(completion(prompt=["a", "b"]))


def test_progress_of_a_broken_stream_arrives() -> None:
    resume = [{"choice": 1, "token_ids": [7, 8], "text_chars": 3, "finished": True}]
    request = chat_request(chat(resume=resume, resume_request_id="r", seed=1, n=2))
    assert request.resume == (Progress(1, (7, 8), 3, True),)
    assert request.resume_request_id == "r"


@pytest.mark.parametrize("text", ["a", "x" * 128, "req-1/2:3"])
def test_request_ids(text: str) -> None:
    assert request_id(text) == text


@pytest.mark.parametrize("text", ["", "x" * 129, "a b", "a\n", "é", "a\x00"])
def test_bad_request_ids(text: str) -> None:
    with pytest.raises(InvalidRequest):
        request_id(text)


def test_timeouts() -> None:
    assert timeout_s("1.5") == 1.5
    for text in ("0", "-1", "x", "nan", "inf", "86401", ""):
        with pytest.raises(InvalidRequest):
            timeout_s(text)

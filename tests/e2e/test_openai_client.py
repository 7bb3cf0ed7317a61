"""The `openai` client, with strict response validation, against an echo fleet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.fakes.fleet import Fleet, echo_fleet

MESSAGES: list = [{"role": "user", "content": "Hello"}]  # type: ignore[type-arg]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with echo_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{fleet.http}/v1",
        api_key="any",
        max_retries=0,
        timeout=30,
        _strict_response_validation=True,
    ) as client:
        yield client


def streamed_completion(client: openai.OpenAI, max_tokens: int) -> list[str]:
    """Texts of a streamed completion.

    The strict client's type demands a finish reason on every event, where OpenAI's API, and so ours, sends null before
    the last one unless it is asked for more.
    """
    stream = client.completions.create(
        model="echo",
        prompt="Once",
        max_tokens=max_tokens,
        seed=1,
        stream=True,
        stream_options={"include_usage": True, "always_finish_reason": True},  # type: ignore[typeddict-unknown-key]
    )
    *events, last = list(stream)
    assert last.usage is not None
    assert last.usage.completion_tokens == max_tokens
    choices = [choice for event in events for choice in event.choices]
    assert [choice.finish_reason for choice in choices] == ["length"] * len(choices)
    return [choice.text for choice in choices]


def test_by_default_a_completion_has_no_reason_before_its_end(client: openai.OpenAI) -> None:
    with client.completions.with_streaming_response.create(
        model="echo", prompt="Once", max_tokens=3, seed=1, stream=True
    ) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    reasons = [json.loads(line)["choices"][0]["finish_reason"] for line in lines]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_chat_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=20, seed=5)
    stream = client.chat.completions.create(
        model="echo", messages=MESSAGES, max_tokens=20, seed=5, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert len(text) == 20
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "length"
    assert events[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 20


def test_completion_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="echo", prompt="Once", max_tokens=12, seed=1)
    assert "".join(streamed_completion(client, max_tokens=12)) == whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 4


def test_three_choices_differ_and_are_repeatable(client: openai.OpenAI) -> None:
    first, again = (
        client.chat.completions.create(model="echo", messages=MESSAGES, n=3, max_tokens=16, seed=9) for _ in range(2)
    )
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    assert first.usage is not None
    assert first.usage.completion_tokens == 48


def test_streamed_choices_are_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="echo", messages=MESSAGES, n=3, max_tokens=16, seed=9)
    texts = ["", "", ""]
    for event in client.chat.completions.create(
        model="echo", messages=MESSAGES, n=3, max_tokens=16, seed=9, stream=True
    ):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="echo", messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=2, seed=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in logprobs.content)
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    completion = client.completions.create(model="echo", prompt="x", max_tokens=3, logprobs=1, seed=1)
    assert completion.choices[0].logprobs is not None
    assert len(completion.choices[0].logprobs.tokens or []) == 3


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    free = client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=64, seed=3)
    text = free.choices[0].message.content or ""
    stop = text[20:23]
    stopped = client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=64, seed=3, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens == text.index(stop) + 3


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").id == "echo"


def test_request_ids_are_echoed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="echo", messages=MESSAGES, max_tokens=1, extra_headers={"x-request-id": "mine-42"}
    )
    assert answer.headers["x-request-id"] == "mine-42"


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert caught.value.code == "model_not_found"


def test_a_bad_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=MESSAGES, temperature=9)
    assert caught.value.param == "temperature"


def test_too_long_a_prompt(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="echo", prompt="x" * 9000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


def test_what_a_worker_refuses_has_the_clients_own_name(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="echo", messages=MESSAGES, response_format={"type": "json_object"}, stream=stream
            )
        assert (caught.value.param, caught.value.code) == ("response_format", "unsupported_feature")


def test_overload_is_a_rate_limit_error_with_a_hint(tmp_path: Path) -> None:
    """Room for one request at a time and a queue of one: of eight at once, most are told when to come back."""
    flags = ("--echo-tokens-per-second", "1000", "--memory-limit", str(8 << 20))
    with echo_fleet(tmp_path, scheduler=("--queue-limit", "1"), worker=flags) as fleet:
        (worker,) = fleet.workers().values()
        tokens = min(64 * (worker["models"][0]["total_blocks"] - 1), 8000) // 2 + 65
        client = openai.OpenAI(base_url=f"{fleet.http}/v1", api_key="any", max_retries=0, timeout=100)

        def ask(_: int) -> str:
            try:
                client.completions.create(model="echo", prompt="x", max_tokens=tokens)
            except openai.RateLimitError as error:
                assert float(error.response.headers["retry-after"]) > 0
                assert error.response.headers["x-should-retry"] == "true"
                return str(error.code)
            return "ok"

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        client.close()
        assert answers.count("ok") == 2
        assert answers.count("overloaded") == 6

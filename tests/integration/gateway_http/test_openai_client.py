"""The `openai` client, with strict validation of every response, against a real server."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pydantic
import pytest
from openai.types import Completion

from gateway.types import GenerationRequest
from llmos.errors import (
    Conflict,
    DeadlineExceeded,
    InternalError,
    LlmosError,
    Overloaded,
    PermissionDenied,
    PromptTooLong,
    Unauthenticated,
    Unavailable,
)
from tests.fakes.engine import CREATED, Script
from tests.integration.gateway_http.conftest import HELLO, Serve

TEXT = "Hello world"


async def test_chat(serve: Serve) -> None:
    server = await serve()
    answer = await server.client.chat.completions.create(model="tiny", messages=HELLO)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert (answer.object, answer.model, answer.created) == ("chat.completion", "tiny", CREATED)
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.total_tokens == 9
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer._request_id == "fake-0"
    assert answer.id == "chatcmpl-fake-0"


async def test_streamed_chat(serve: Serve) -> None:
    server = await serve()
    chunks = [
        chunk
        async for chunk in await server.client.chat.completions.create(model="tiny", messages=HELLO, stream=True, n=2)
    ]
    for number in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == number]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == TEXT
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_usage_at_the_end_of_a_stream(serve: Serve) -> None:
    server = await serve()
    stream = await server.client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(serve: Serve, stream: bool) -> None:
    server = await serve()
    answer = await server.client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=2, stream=stream
    )
    if stream:
        choices = [chunk.choices[0] async for chunk in answer]
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    else:
        entries = answer.choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["Hel", "lo ", "wor", "ld"]
    assert [bytes(entry.bytes) for entry in entries] == [b"Hel", b"lo ", b"wor", b"ld"]
    assert [[top.logprob for top in entry.top_logprobs] for entry in entries] == [[-9999.0, -1.0]] * 4


async def test_completion_with_three_choices_and_logprobs(serve: Serve) -> None:
    server = await serve()
    answer = await server.client.completions.create(model="tiny", prompt="once", n=3, logprobs=1, stop=["x"], seed=7)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (number, TEXT, "stop") for number in range(3)
    ]
    assert answer.choices[2].logprobs.tokens == ["Hel", "lo ", "wor", "ld"]
    assert answer.choices[2].logprobs.text_offset == [0, 3, 6, 9]
    assert answer.usage.completion_tokens == 12
    (generation,) = server.engine.generations
    assert generation.request.params.stop == ("x",)
    assert generation.request.params.seed == 7


async def test_streamed_completion(serve: Serve) -> None:
    """OpenAI's API says `finish_reason: null` until a choice ends, and so do we; its client's type for completions
    forgets the null, so strict validation gets a stand-in for exactly that."""
    server = await serve()
    stream = await server.lenient.completions.create(model="tiny", prompt=[1, 2, 3], n=2, stream=True)
    chunks = [chunk async for chunk in stream]
    for number in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == number]
        assert "".join(choice.text for choice in own) == TEXT
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["stop"]
    for chunk in chunks:
        values = chunk.model_dump()
        for choice in values["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        Completion.model_validate(values, strict=True)
    (generation,) = server.engine.generations
    assert generation.request.token_ids == (1, 2, 3)


async def test_streamed_completion_for_clients_that_demand_a_reason_on_every_event(serve: Serve) -> None:
    server = await serve()
    stream = await server.client.completions.create(
        model="tiny",
        prompt="a",
        n=2,
        stream=True,
        stream_options={"include_usage": True, "always_finish_reason": True},  # type: ignore[typeddict-unknown-key]
    )
    chunks = [chunk async for chunk in stream]
    for number in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == number]
        assert "".join(choice.text for choice in own) == TEXT
        assert [choice.finish_reason for choice in own] == ["length"] * (len(own) - 1) + ["stop"]
    assert chunks[-1].usage is not None


@pytest.mark.parametrize(
    ("asked", "got", "wanted"),
    [("flex", "flex", "batch"), ("priority", "default", "interactive"), ("auto", "default", None)],
)
async def test_a_tier_asks_for_a_class_up_to_the_keys(
    serve: Serve, asked: Literal["flex", "priority", "auto"], got: str, wanted: str | None
) -> None:
    server = await serve()
    answer = await server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], service_tier=asked
    )
    assert answer.service_tier == got
    (generation,) = server.engine.generations
    assert generation.request.priority == wanted


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_make_choices_prompt_by_prompt(serve: Serve, stream: bool) -> None:
    server = await serve(lambda request: Script(pieces=(f"<{request.text}", ">")))
    answer = await server.lenient.completions.create(model="tiny", prompt=["a", "b", "c"], n=2, stream=stream)
    texts = dict.fromkeys(range(6), "")
    for part in [chunk async for chunk in answer] if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == ["<a>", "<a>", "<b>", "<b>", "<c>", "<c>"]
    for generation in server.engine.generations:
        await generation.closed.wait()
    if not stream:
        assert answer.usage.prompt_tokens == 15
        assert answer.usage.completion_tokens == 12


async def test_one_failing_prompt_fails_all_and_leaves_none_running(serve: Serve) -> None:
    def script(request: GenerationRequest) -> Script:
        return Script(fail=Unavailable("lost")) if request.text == "b" else Script(endless="x")

    server = await serve(script)
    with pytest.raises(openai.InternalServerError) as caught:
        await server.client.completions.create(model="tiny", prompt=["a", "b"])
    assert caught.value.status_code == 503
    for generation in server.engine.generations:
        await generation.closed.wait()


async def test_models(serve: Serve) -> None:
    server = await serve()
    (model,) = (await server.client.models.list()).data
    assert (model.id, model.object, model.created, model.owned_by) == ("tiny", "model", CREATED, "llmos")
    assert await server.client.models.retrieve("tiny") == model
    assert (model.root, model.parent) == ("tiny", None)  # type: ignore[attr-defined]  # as vLLM says it
    with pytest.raises(openai.NotFoundError) as caught:
        await server.client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


REFUSALS: list[tuple[LlmosError, type[openai.APIStatusError], int, str]] = [
    (PromptTooLong("too long", param="messages"), openai.BadRequestError, 400, "context_length_exceeded"),
    (Unauthenticated("who"), openai.AuthenticationError, 401, "invalid_api_key"),
    (PermissionDenied("no"), openai.PermissionDeniedError, 403, "permission_denied"),
    (Conflict("in use"), openai.ConflictError, 409, "conflict"),
    (Overloaded("full", retry_after_s=3), openai.RateLimitError, 429, "overloaded"),
    (Unavailable("no leader"), openai.InternalServerError, 503, "unavailable"),
    (DeadlineExceeded("late"), openai.InternalServerError, 504, "deadline_exceeded"),
    (InternalError("bug"), openai.InternalServerError, 500, "internal_error"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_each_refusal_is_its_exception(serve: Serve, stream: bool) -> None:
    """Whether the session refuses at once or the fleet does so before the first output."""
    scripts: list[Script] = []
    server = await serve(lambda request: scripts.pop())
    for error, kind, status, code in REFUSALS:
        for script in (Script(refuse=error), Script(fail=error, fail_before_output=True)):
            scripts.append(script)
            with pytest.raises(kind) as caught:
                await server.client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
            assert (caught.value.status_code, caught.value.code) == (status, code)
            assert caught.value.param == error.param
            assert caught.value.request_id


async def test_a_bug_shows_nothing_of_itself(serve: Serve) -> None:
    server = await serve(Script(fail=KeyError("secret"), fail_before_output=True))
    with pytest.raises(openai.InternalServerError) as caught:
        await server.client.chat.completions.create(model="tiny", messages=HELLO)
    assert caught.value.status_code == 500
    assert "secret" not in str(caught.value)
    assert str(caught.value.request_id) in str(caught.value)


async def test_bad_fields_and_unknown_models(serve: Serve) -> None:
    server = await serve()
    with pytest.raises(openai.BadRequestError) as bad:
        await server.client.chat.completions.create(model="tiny", messages=HELLO, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        await server.client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"temprature": 1})
    assert "Did you mean 'temperature'" in str(unknown.value)
    with pytest.raises(openai.BadRequestError) as format_:
        await server.client.chat.completions.create(
            model="tiny", messages=HELLO, response_format={"type": "json_schema", "json_schema": {"name": "x y"}}
        )
    assert format_.value.param == "response_format.json_schema.name"
    with pytest.raises(openai.NotFoundError) as missing:
        await server.client.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as embed:
        await server.client.embeddings.create(model="tiny", input="x")
    assert embed.value.code == "unsupported_feature"


class Person(pydantic.BaseModel):
    """What the model is asked for."""

    name: str
    age: int


async def test_a_parsed_answer_of_a_pydantic_model(serve: Serve) -> None:
    server = await serve(Script(pieces=('{"name": "Ada", ', '"age": 36}')))
    answer = await server.client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)
    async with server.client.chat.completions.stream(model="tiny", messages=HELLO, response_format=Person) as events:
        assert (await events.get_final_completion()).choices[0].message.parsed == Person(name="Ada", age=36)
    for generation in server.engine.generations:
        constraint = generation.request.params.constraint
        assert constraint is not None and constraint.kind == "json_schema"
        assert list(json.loads(constraint.text)["properties"]) == ["name", "age"]


async def test_a_client_comes_back_after_an_overload(serve: Serve) -> None:
    scripts = iter([Script(refuse=Overloaded("full", retry_after_s=0.01)), Script()])
    server = await serve(lambda request: next(scripts))
    patient = server.client.with_options(max_retries=1)
    answer = await patient.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == TEXT


async def test_an_error_in_the_middle_of_a_stream_reaches_the_client(serve: Serve) -> None:
    server = await serve(Script(fail=Unavailable("the fleet lost it")))
    said = ""
    with pytest.raises(openai.APIError, match="the fleet lost it") as caught:
        async for chunk in await server.client.chat.completions.create(model="tiny", messages=HELLO, stream=True):
            said += chunk.choices[0].delta.content or ""
    assert said == TEXT
    assert caught.value.code == "unavailable"

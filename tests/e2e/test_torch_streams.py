"""The real model on two torch workers: the same tokens alone, in a crowd, and after a worker is killed."""

from __future__ import annotations

import datetime
import functools
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import openai
import pydantic
import pytest

from llmos.v1 import fleet_pb2
from llmos.v1 import inference_pb2 as api
from llmos.v1.fleet_pb2_grpc import FleetStub
from llmos.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.default_model import default_model
from tests.fakes.fleet import Fleet, Process, running_fleet, wait_for

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]
in_fp32 = pytest.mark.parametrize("fleet", [("--precision", "fp32")], indirect=True, ids=["fp32"])
in_default_precision = pytest.mark.parametrize("fleet", [()], indirect=True, ids=["default"])
LONG = 112
"""Tokens that take seconds, so that a worker can be killed among them."""
HUES = ["red", "dark blue", "green"]
TOPICS = ("the sea", "bread", "a train", "winter", "glass", "music", "iron", "a letter")


@dataclass(slots=True)
class Answer:
    """What one stream delivered."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: int = 0
    first: threading.Event = field(default_factory=threading.Event)


def prompt(number: int) -> str:
    return f"Write about {TOPICS[number % len(TOPICS)]}. " + "Be brief and clear. " * (number % 7)


def params(number: int, greedy: bool) -> dict[str, Any]:
    tokens = 5 + 2 * (number % 6)
    return {"max_tokens": tokens, "temperature": 0.0 if greedy else 0.9, "top_p": 0.95, "seed": 1000 + number}


class Client:
    """Streams chats over the public gRPC API."""

    def __init__(self, fleet: Fleet, model: str) -> None:
        self._channel = grpc.insecure_channel(fleet.grpc)
        self._stub = InferenceStub(self._channel)
        self._model = model

    def stream(self, text: str, answer: Answer | None = None, **generation: Any) -> Answer:
        answer = answer or Answer()
        request = api.StreamChatRequest(model=self._model, params=api.GenerationParams(**generation))
        request.messages.add(role=api.ROLE_USER, content=text)
        for event in self._stub.StreamChat(request, timeout=300):
            if event.WhichOneof("event") == "delta":
                assert event.delta.index == len(answer.tokens)
                answer.tokens.extend(event.delta.token_ids)
                answer.text += event.delta.text
                answer.finish = event.delta.finish_reason or answer.finish
                answer.first.set()
        return answer

    def close(self) -> None:
        self._channel.close()


def add_worker(fleet: Fleet, model: str, *flags: str) -> Process:
    # Whole workers are killed here: a spare engine is of no use.
    return fleet.worker("--backend", "torch", "--threads", "1", "--spare-engine", "no", *flags, model=model)


def wait_for_workers(fleet: Fleet, ids: set[str]) -> None:
    wait_for(
        lambda: {i for i, worker in fleet.workers().items() if worker["state"] == "ready"} == ids,
        f"exactly {len(ids)} ready workers",
        timeout_s=120,
    )


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Two workers with the flags that the test names."""
    name = default_model()[0]
    with running_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        with fleet.together():
            fleet.scheduler()
            workers = [add_worker(fleet, name, *request.param) for _ in range(2)]
            fleet.gateway()
        fleet.wait_ready(timeout_s=120)
        wait_for_workers(fleet, {worker.id for worker in workers})
        yield fleet


@pytest.fixture
def client(fleet: Fleet) -> Iterator[Client]:
    client = Client(fleet, default_model()[0])
    yield client
    client.close()


def reference(folder: Path, texts: list[str], lengths: list[int]) -> list[list[int]]:
    """Greedy continuations by transformers' own `generate` in fp32, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    continuations = []
    for text, length in zip(texts, lengths, strict=True):
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            out = model.generate(
                **ids, max_new_tokens=length, do_sample=False, temperature=None, top_p=None, top_k=None
            )
        continuations.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return continuations


@in_fp32
def test_32_concurrent_chats_equal_generate(fleet: Fleet, client: Client) -> None:
    """Half greedy, half sampled; the greedy ones token for token as transformers has them."""
    numbers = range(32)
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda n: client.stream(prompt(n), **params(n, greedy=n % 2 == 0)), numbers))
    assert all(answer.finish and answer.tokens for answer in answers)
    greedy = [n for n in numbers if n % 2 == 0]
    expected = reference(
        default_model()[1], [prompt(n) for n in greedy], [params(n, True)["max_tokens"] for n in greedy]
    )
    assert [answers[n].tokens for n in greedy] == expected


@in_fp32
def test_a_seeded_request_is_the_same_alone_and_among_fifteen(client: Client) -> None:
    alone = client.stream("Tell me a story.", max_tokens=16, temperature=1.0, seed=77)
    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(client.stream, prompt(n), **params(n, greedy=False)) for n in range(15)]
        crowded = client.stream("Tell me a story.", max_tokens=16, temperature=1.0, seed=77)
        assert all(other.result().finish for other in others)
    assert crowded.tokens == alone.tokens
    assert crowded.text == alone.text


def workers_in_use(fleet: Fleet) -> list[str]:
    """The worker of each running request."""
    with grpc.insecure_channel(fleet.grpc) as channel:
        rows = FleetStub(channel).ListRequests(fleet_pb2.ListRequestsRequest(), timeout=30).requests
    return [row.worker for row in rows if row.worker]


def worker_of_most(fleet: Fleet) -> str:
    """The worker with most running requests, once both the streams and it are known."""

    def busiest() -> str:
        names = workers_in_use(fleet)
        return max(names, key=names.count) if len(names) >= 8 else ""

    return wait_for(busiest, "eight streams to run")


class Person(pydantic.BaseModel):
    """What the model is asked for."""

    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=120)
    born: datetime.date
    colour: Literal["red", "green"]


@in_default_precision
def test_answers_look_as_they_were_asked_to(fleet: Fleet) -> None:
    client = openai.OpenAI(base_url=f"{fleet.http}/v1", api_key="any", max_retries=0)
    ask = functools.partial(
        client.chat.completions.create,
        model=default_model()[0],
        messages=[{"role": "user", "content": "Invent a person."}],
        max_tokens=200,
    )
    parsed = client.chat.completions.parse(**ask.keywords, response_format=Person, n=3, seed=5)
    assert all(isinstance(choice.message.parsed, Person) for choice in parsed.choices)
    for fields, pattern in (
        ({"guided_regex": "[A-Z][a-z]{2,9}"}, "[A-Z][a-z]{2,9}"),
        ({"guided_choice": HUES}, "|".join(HUES)),
    ):
        choice = ask(extra_body=fields, logprobs=True).choices[0]
        assert re.fullmatch(pattern, choice.message.content)
        assert choice.finish_reason == "stop"
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ask, max_tokens=40)
        with pytest.raises(openai.BadRequestError) as caught:
            ask(extra_body={"guided_json": {"type": "integer", "multipleOf": 9_999_991}})
        assert (caught.value.code, caught.value.param) == ("invalid_constraint", "guided_json")
        assert other.result().choices
    client.close()


@in_default_precision
def test_eight_streams_survive_kill_9_and_a_new_worker_is_used(fleet: Fleet, client: Client) -> None:
    wanted: list[dict[str, Any]] = [
        {"max_tokens": LONG, "min_tokens": LONG, "temperature": 0.8, "seed": 500 + n} for n in range(8)
    ]
    for constrained in wanted[:2]:
        constrained["constraint"] = api.Constraint(regex="([a-z]{1,12} )+")
    with ThreadPoolExecutor(8) as pool:
        undisturbed = [f.result() for f in [pool.submit(client.stream, prompt(n), **wanted[n]) for n in range(8)]]
        answers = [Answer() for _ in range(8)]
        streams = [pool.submit(client.stream, prompt(n), answers[n], **wanted[n]) for n in range(8)]
        assert all(answer.first.wait(120) for answer in answers)
        victim = next(process for process in fleet.processes if process.id == worker_of_most(fleet))
        victim.kill()
        cut_at = [len(answer.tokens) for answer in answers]
        assert min(cut_at) < LONG, "nothing was left to do when the worker died"
        assert [f.result().tokens for f in streams] == [answer.tokens for answer in undisturbed]
    assert [answer.text for answer in answers] == [answer.text for answer in undisturbed]
    wait_for(lambda: victim.id not in fleet.workers(), "the killed worker to leave the list")
    survivors = set(fleet.workers())
    joined = add_worker(fleet, default_model()[0])
    wait_for_workers(fleet, survivors | {joined.id})
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(client.stream, prompt(n), **wanted[n]) for n in range(8)]
        wait_for(lambda: joined.id in workers_in_use(fleet), "the new worker to be used")
        assert [f.result().tokens for f in streams] == [answer.tokens for answer in undisturbed]

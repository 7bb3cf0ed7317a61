"""Tokenizers and templates come from the scheduler, by hash."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from gateway.catalogue import Catalogue
from gateway.types import GenerationRequest, Params, TraceHeaders, Turn
from llmos.config import TlsConfig
from llmos.errors import InvalidRequest, ModelNotFound, Unavailable, UnsupportedFeature
from llmos.internal.v1 import requests_pb2
from llmos.rpc import open_channel
from tests.fakes.certificates import make_authority
from tests.fakes.scheduler import STOP, echo_model, output
from tests.integration.gateway_grpc.conftest import NewScheduler
from tests.integration.gateway_grpc.gateway import ALICE, Gateway, collect, eventually, running, text_of
from tests.unit.gateway_text import vocabularies

TOKENIZER = vocabularies.byte_level()
TEMPLATE = (
    b"{% for m in messages %}{{ raise_exception('No system turn.') if m.role == 'system' }}"
    b"{{ m.content + eos_token }}{% endfor %}"
)
HASHES = {"tokenizer_hash": sha256(TOKENIZER).hexdigest(), "chat_template_hash": sha256(TEMPLATE).hexdigest()}
BLOBS = {sha256(blob).hexdigest(): blob for blob in (TOKENIZER, TEMPLATE)}
MODEL = echo_model("real", vocab_size=vocabularies.size(TOKENIZER), eos_token=vocabularies.END, **HASHES)


def chat(content: str, role: str = "user", model: str = "real") -> GenerationRequest:
    return GenerationRequest("chat", model, Params(max_tokens=8), turns=(Turn(role, content),))  # type: ignore[arg-type]


async def start(gateway: Gateway, request: GenerationRequest) -> object:
    return await gateway.sessions.generate(request, ALICE, request_id="", trace=TraceHeaders())


async def test_a_conversation_is_rendered_tokenized_and_read_back(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(models=[MODEL], blobs=BLOBS)
    library = vocabularies.reference(TOKENIZER)
    async with running(address) as gateway:
        await gateway.ready()
        for _ in range(2):
            stream = await gateway.sessions.generate(chat("hello é"), ALICE, request_id="", trace=TraceHeaders())
            request = await scheduler.next_submit()
            assert list(request.token_ids) == library.encode("hello é" + vocabularies.END).ids
            assert request.tokenizer_hash == MODEL.tokenizer_hash
            answer = library.encode("hello wé").ids
            end = library.token_to_id(vocabularies.END)
            scheduler.send(output(request.request_id, 0, [*answer, end], finish=STOP))
            assert text_of(await collect(stream)) == "hello wé"
    assert sorted(scheduler.fetched) == sorted(BLOBS)


async def test_an_adapter_is_asked_for_by_its_name_and_travels_with_its_base(new_scheduler: NewScheduler) -> None:
    tone = echo_model("tone", version="t1", base_model="echo")
    scheduler, address = await new_scheduler(models=[echo_model(), tone, echo_model("stray", base_model="gone")])
    prompt = "x" * 200
    async with running(address) as gateway:
        await gateway.ready()
        sent = {}
        for name in ("echo", "tone"):
            request = GenerationRequest("completion", name, Params(max_tokens=8), text=prompt)
            await gateway.sessions.generate(request, ALICE, request_id="", trace=TraceHeaders())
            sent[name] = await scheduler.next_submit()
        assert [(one.model, one.adapter, one.adapter_version) for one in sent.values()] == [
            ("echo", "", ""),
            ("echo", "tone", "t1"),
        ]
        assert sent["echo"].model_version == sent["tone"].model_version == echo_model().version
        assert list(sent["echo"].token_ids) == list(sent["tone"].token_ids)
        assert len(sent["tone"].prefix_hashes) == 3
        assert not set(sent["echo"].prefix_hashes) & set(sent["tone"].prefix_hashes)
        with pytest.raises(ModelNotFound, match="base"):
            await start(gateway, GenerationRequest("completion", "stray", Params(max_tokens=8), text=prompt))
        listed = {model.name: model.base_model for model in gateway.sessions.models()}
        assert listed == {"echo": "", "tone": "echo", "stray": "gone"}


async def test_what_a_template_refuses_is_the_clients_error(new_scheduler: NewScheduler) -> None:
    _, address = await new_scheduler(models=[MODEL], blobs=BLOBS)
    async with running(address) as gateway:
        await gateway.ready()
        with pytest.raises(InvalidRequest, match="No system turn"):
            await start(gateway, chat("x", role="system"))


async def test_a_damaged_blob_is_never_used(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(models=[MODEL], blobs=dict.fromkeys(BLOBS, b"damaged"))
    async with running(address) as gateway:
        await gateway.ready()
        with pytest.raises(Unavailable):
            await start(gateway, chat("x"))
        scheduler.blobs = BLOBS
        await start(gateway, chat("x"))


async def test_models_come_and_go_with_the_catalogue(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(models=[])
    async with running(address) as gateway:
        await eventually(lambda: gateway.link.connected)
        assert not gateway.sessions.ready()
        with pytest.raises(Unavailable, match="yet"):
            await start(gateway, chat("x", model="echo"))
        scheduler.push_catalogue(3, echo_model("echo"))
        await eventually(gateway.sessions.ready)
        scheduler.push_catalogue(2, echo_model("old"))
        scheduler.push_catalogue(4, echo_model("new", capabilities=["completion"]))
        await eventually(lambda: [model.name for model in gateway.sessions.models()] == ["new"])
        with pytest.raises(ModelNotFound):
            await start(gateway, chat("x", model="echo"))
        with pytest.raises(UnsupportedFeature):
            await start(gateway, chat("x", model="new"))


async def test_an_older_catalogue_changes_nothing() -> None:
    async def fetch(blob_hash: str) -> bytes:
        raise Unavailable(blob_hash)

    catalogue = Catalogue(fetch)

    def push(term: int, revision: int) -> list[str]:
        model = echo_model(f"{term}.{revision}")
        catalogue.replace(requests_pb2.Catalogue(revision=revision, models=[model]), term)
        return [served.name for served in catalogue.models()]

    assert push(1, 5) == ["1.5"]
    assert push(1, 4) == ["1.5"]
    assert push(2, 1) == ["2.1"]
    assert push(1, 6) == ["2.1"]


async def test_a_fleet_without_models_is_a_matter_of_time_only_while_it_loads_some() -> None:
    async def fetch(blob_hash: str) -> bytes:
        raise Unavailable(blob_hash)

    catalogue = Catalogue(fetch)

    def asked() -> type[Exception]:
        with pytest.raises((ModelNotFound, Unavailable)) as caught:
            catalogue.find("gpt-4", "chat")
        return caught.type

    assert asked() is Unavailable, "no scheduler has been heard"
    catalogue.replace(requests_pb2.Catalogue(revision=1, loading=True), 1)
    assert asked() is Unavailable
    catalogue.replace(requests_pb2.Catalogue(revision=2), 1)
    assert asked() is ModelNotFound
    catalogue.replace(requests_pb2.Catalogue(revision=1, models=[echo_model("echo")]), 2)
    assert asked() is ModelNotFound


async def test_models_are_made_ready_before_they_are_asked_for(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(models=[MODEL], blobs=BLOBS)
    async with running(address, prefetch=True) as gateway:
        await gateway.ready()
        await eventually(lambda: len(scheduler.fetched) == 2)


async def test_the_link_speaks_mutual_tls(new_scheduler: NewScheduler, tmp_path: Path) -> None:
    tls = make_authority(tmp_path)
    _, address = await new_scheduler(tls=tls)
    async with running(address, connect=lambda to: open_channel(to, tls)) as gateway:
        await gateway.ready()
    stranger = TlsConfig(make_authority(tmp_path / "other").ca_file, tls.cert_file, tls.key_file)
    async with running(address, connect=lambda to: open_channel(to, stranger), hello_timeout_s=0.2) as gateway:
        await eventually(lambda: gateway.link.counters()["tries"] > 1)
        assert not gateway.link.connected

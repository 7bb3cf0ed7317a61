"""LoRA adapters in a real fleet: asked for by name, loaded on demand, unbroken when a worker is killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

from llmos.store import Store, import_model
from tests.fakes.adapters import RandomAdapter
from tests.fakes.fleet import Fleet, running_fleet, wait_for
from tests.integration.engine.tiny import generate
from tests.unit.gateway_text import vocabularies

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(300)]
PROMPT = list(range(40, 70))
TOKENS = 24
LONG = 300


@dataclass(slots=True)
class Served:
    """A fleet of two workers with a tiny model and two adapters to it."""

    fleet: Fleet
    store: Store
    model: Any
    adapters: dict[str, RandomAdapter]

    def ask(self, model: str, tokens: int = TOKENS) -> dict[str, Any]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
        answer = httpx.post(f"{self.fleet.http}/v1/completions", json=body, timeout=60)
        return {"status": answer.status_code, **answer.json()}

    def holders(self, name: str) -> list[str]:
        """Workers that have a model loaded."""
        listed = {"name": name, "state": "loaded"}.items()
        workers = self.fleet.workers().items()
        return [worker for worker, node in workers if any(listed <= model.items() for model in node["models"])]


def write_base(folder: Path) -> Any:
    tokenizer = vocabularies.byte_level()
    config = transformers.LlamaConfig(
        vocab_size=vocabularies.size(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    return model


def text_of(model: Any) -> str:
    """transformers' own greedy answer."""
    tokenizer = vocabularies.reference(vocabularies.byte_level())
    return str(tokenizer.decode(generate(model, PROMPT, TOKENS)))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapters")
    model, store = write_base(folder / "tiny"), Store(folder / "store")
    import_model(store, str(folder / "tiny"), environ={})
    adapters = {name: RandomAdapter.of(model, seed) for seed, name in enumerate(("tone", "style"))}
    with running_fleet(folder / "fleet") as fleet:
        for name, adapter in adapters.items():
            import_model(store, str(adapter.write(folder / name)), base="tiny", environ={})
        with fleet.together():
            fleet.scheduler()
            for _ in range(2):
                flags = ("--precision", "fp32", "--threads", "1", "--spare-engine", "no", "--store", str(store.path))
                fleet.worker(*flags, model="tiny")
            fleet.gateway()
        fleet.wait_ready(models=3)
        yield Served(fleet, store, model, adapters)


def test_adapters_are_listed_with_their_base_and_loaded_when_asked_for(served: Served) -> None:
    listed = json.loads(served.fleet.get("/v1/models")[1])["data"]
    assert {model["id"]: model["parent"] for model in listed} == {"style": "tiny", "tiny": None, "tone": "tiny"}
    assert served.holders("style") == []
    assert served.ask("style")["status"] == 200
    assert len(served.holders("style")) == 1
    assert served.holders("tone") == []


def test_each_answers_as_the_merged_model_would_alone_and_together(served: Served) -> None:
    names = ["tiny", *served.adapters]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(served.ask, names * 4))
    expected = {name: text_of(adapter.merged(served.model)) for name, adapter in served.adapters.items()}
    expected["tiny"] = text_of(served.model)
    assert [answer["model"] for answer in answers] == names * 4
    assert [answer["choices"][0]["text"] for answer in answers] == [expected[name] for name in names * 4]
    assert len(set(expected.values())) == len(names)


def test_an_adapter_imported_meanwhile_is_served_without_a_restart(served: Served, tmp_path: Path) -> None:
    late = RandomAdapter.of(served.model, 7, rank=12)
    import_model(served.store, str(late.write(tmp_path / "late")), base="tiny", environ={})
    answer = wait_for(lambda: (said := served.ask("late"))["status"] == 200 and said, "the adapter to be served")
    assert answer["choices"][0]["text"] == text_of(late.merged(served.model))


def test_an_unknown_adapter_is_an_unknown_model(served: Served) -> None:
    answer = served.ask("nobody")
    assert (answer["status"], answer["error"]["code"]) == (404, "model_not_found")


def test_a_stream_survives_the_death_of_its_worker(served: Served) -> None:
    whole = served.ask("tone", LONG)["choices"][0]["text"]
    (holder,) = served.holders("tone")
    victim = next(process for process in served.fleet.processes if process.id == holder)
    body = {"model": "tone", "prompt": PROMPT, "max_tokens": LONG, "temperature": 0, "stream": True}
    text = ""
    with httpx.stream("POST", f"{served.fleet.http}/v1/completions", json=body, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if victim.popen.poll() is None:
                    victim.kill()
    assert text == whole
    assert served.holders("tone") != [holder]

"""Vectors, labels and scores from a real fleet: transformers' own, bit for bit the same however they were asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from llmos.store import Store, import_model
from llmos.v1 import inference_pb2 as api
from llmos.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.default_model import MINILM, minilm
from tests.fakes.fleet import Fleet, running_fleet, wait_for

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(300)]

TEXTS = [f"The {colour} fox number {n}" + " runs on" * (n % 9) for n in range(8) for colour in ("red", "old", "quick")]
LABELS = ("bad", "so so", "good")
PAIRS = ("w1 w2 w3", ["w4 w5", "w6", "w7 w8 w9 w10"])
Json = dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.fakes.encoders import write_encoder

    folder = tmp_path_factory.mktemp("models")
    write_encoder("bert", folder / "classes", LABELS)
    write_encoder("roberta", folder / "ranker", ("relevant",))
    return {MINILM: minilm(), "classes": folder / "classes", "ranker": folder / "ranker"}


@pytest.fixture(scope="module")
def fleet(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    root = tmp_path_factory.mktemp("store")
    for name, folder in folders.items():
        import_model(Store(root), str(folder), name=name)
    with running_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        flags = ["--etcd-endpoints", fleet.etcd.address, "--backend", "torch", "--threads", "1", "--store", str(root)]
        flags += ["--spare-engine", "no"]
        with fleet.together():
            fleet.scheduler()
            for name in ("worker-one", "worker-two"):
                fleet.start("worker", *flags, "--model", ",".join(folders), name=name)
            fleet.gateway()
        fleet.wait_ready(models=3, timeout_s=120)
        yield fleet


@pytest.fixture(scope="module")
def client(fleet: Fleet) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{fleet.http}/v1", api_key="any", _strict_response_validation=True)


def vectors(client: openai.OpenAI, texts: list[str]) -> list[list[float]]:
    answer = client.embeddings.create(model=MINILM, input=texts, encoding_format="float")
    return [entry.embedding for entry in answer.data]


def test_vectors_are_those_of_transformers_alone_and_together(client: openai.OpenAI, fleet: Fleet) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    together = vectors(client, TEXTS)
    assert [vectors(client, [text])[0] for text in TEXTS[:6]] == together[:6]
    packed = openai.OpenAI(base_url=f"{fleet.http}/v1", api_key="any").embeddings.create(model=MINILM, input=TEXTS)
    assert [[float(value) for value in entry.embedding] for entry in packed.data] == together

    folder = minilm()
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        rows = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((rows * mask).sum(1) / mask.sum(1), dim=1)
    assert float((torch.tensor(together) * expected).sum(1).min()) >= 0.99999
    assert packed.usage.prompt_tokens == int(mask.sum())


def test_labels_and_scores_are_those_of_transformers(fleet: Fleet, folders: dict[str, Path]) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForSequenceClassification

    def logits(name: str, *texts: str) -> torch.Tensor:
        model = AutoModelForSequenceClassification.from_pretrained(folders[name]).eval()
        encoded = Tokenizer.from_file(str(folders[name] / "tokenizer.json")).encode(*texts)
        kinds = {"token_type_ids": torch.tensor([encoded.type_ids])} if name == "classes" else {}
        with torch.inference_mode():
            return model(input_ids=torch.tensor([encoded.ids]), **kinds).logits[0]

    classified = post(fleet, "/v1/classify", {"model": "classes", "input": PAIRS[1]})["data"]
    assert [entry["probs"] for entry in classified] == [
        pytest.approx(logits("classes", text).softmax(-1).tolist(), abs=1e-5) for text in PAIRS[1]
    ]
    assert all(entry["label"] == LABELS[entry["probs"].index(max(entry["probs"]))] for entry in classified)
    scored = post(fleet, "/v1/score", {"model": "ranker", "text_1": PAIRS[0], "text_2": PAIRS[1]})["data"]
    scores = [entry["score"] for entry in scored]
    assert scores == [pytest.approx(float(logits("ranker", PAIRS[0], text).sigmoid()), abs=1e-5) for text in PAIRS[1]]
    ranked = post(fleet, "/rerank", {"model": "ranker", "query": PAIRS[0], "documents": PAIRS[1]})["results"]
    assert [entry["relevance_score"] for entry in ranked] == sorted(scores, reverse=True)


def test_meaning_ranks_texts(fleet: Fleet) -> None:
    documents = ["Interest rates rose again.", "A kitten sleeps on the sofa.", "The train was late."]
    answer = post(fleet, "/v1/rerank", {"model": MINILM, "query": "Where is the cat?", "documents": documents})
    assert answer["results"][0]["index"] == 1


def test_grpc_and_the_command_give_the_same(fleet: Fleet, client: openai.OpenAI) -> None:
    expected = vectors(client, TEXTS[:2])
    with grpc.insecure_channel(fleet.grpc) as channel:
        stub = InferenceStub(channel)
        embedded = stub.Embed(api.EmbedRequest(model=MINILM, inputs=TEXTS[:2]), timeout=30)
        assert [list(vector.values) for vector in embedded.embeddings] == expected
        labelled = stub.Classify(api.ClassifyRequest(model="classes", inputs=PAIRS[1]), timeout=30)
        scored = stub.Score(api.ScoreRequest(model="ranker", query=PAIRS[0], texts=PAIRS[1]), timeout=30)
    classified = post(fleet, "/v1/classify", {"model": "classes", "input": PAIRS[1]})["data"]
    assert [entry.labels[0].label for entry in labelled.classifications] == [entry["label"] for entry in classified]
    scores = post(fleet, "/v1/score", {"model": "ranker", "text_1": PAIRS[0], "text_2": PAIRS[1]})["data"]
    assert list(scored.scores) == [entry["score"] for entry in scores]
    done = fleet.cli("embed", MINILM, *TEXTS[:2], "--json")
    assert json.loads(done.stdout)["embeddings"] == expected


def post(fleet: Fleet, path: str, body: Json) -> Json:
    answer = httpx.post(fleet.http + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


REFUSED = [
    *(("Embed", {"model": MINILM, "inputs": inputs}) for inputs in ([], [""], ["a", ""], ["a"] * 2049, ["a " * 255])),
    *(("Embed", {"model": model, "inputs": ["a"]}) for model in ("", "nope", "classes", "ranker", "x" * 257)),
    *(("Classify", {"model": "classes", "inputs": inputs}) for inputs in ([], [""], ["w1 " * 95])),
    *(("Classify", {"model": model, "inputs": ["a"]}) for model in (MINILM, "ranker")),
    *(("Score", {"model": "ranker", "query": "a", "texts": texts}) for texts in ([], [""], ["w1 " * 92], ["a"] * 2049)),
    *(("Score", {"model": "ranker", "query": query, "texts": ["a"]}) for query in ("", "w1 " * 95)),
    ("Score", {"model": "classes", "query": "a", "texts": ["b"]}),
]
HTTP = {"Embed": "/v1/embeddings", "Classify": "/v1/classify", "Score": "/v1/score"}
FIELDS = {"inputs": "input", "query": "text_1", "texts": "text_2"}


def test_both_wires_refuse_the_same(fleet: Fleet) -> None:
    with grpc.insecure_channel(fleet.grpc) as channel, httpx.Client(base_url=fleet.http, timeout=30) as http:
        for method, fields in REFUSED:
            body = {FIELDS.get(name, name): value for name, value in fields.items()}
            error = http.post(HTTP[method], json=body).json()["error"]
            with pytest.raises(grpc.RpcError) as caught:
                getattr(InferenceStub(channel), method)(getattr(api, f"{method}Request")(**fields), timeout=30)
            said = dict(caught.value.trailing_metadata())  # type: ignore[attr-defined]
            assert said["llmos-error-code"] == error["code"], (method, str(fields)[:200])
            assert said.get("llmos-error-param") == error["param"], (method, str(fields)[:200])
        chat = {"model": MINILM, "messages": [{"role": "user", "content": "Hi"}]}
        for path, wrong in (("/v1/chat/completions", chat), ("/v1/completions", {"model": MINILM, "prompt": "a"})):
            answer = http.post(path, json=wrong)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_feature")


def test_texts_of_a_killed_worker_get_the_same_vectors(fleet: Fleet, client: openai.OpenAI) -> None:
    texts = [f"{text} and {n} more" for n in range(12) for text in TEXTS]
    undisturbed = vectors(client, texts)

    def busy() -> str:
        rows = json.loads(fleet.cli("ps", "--json").stdout)
        return next((row["worker"] for row in rows if row["worker"]), "")

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(vectors, client, texts)
        victim = wait_for(busy, "a worker to have texts")
        next(process for process in fleet.processes if process.id == victim).kill()
        assert not asked.done(), "nothing was left to do when the worker died"
        assert asked.result() == undisturbed

"""Encoders: transformers' own values, the same bits alone and in any batch, and the step loop around them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmos.errors import PromptTooLong, UnsupportedFeature
from tests.fakes.clock import ManualClock
from tests.fakes.encoders import CONTEXT, FAMILIES, WORDS, write_encoder
from worker.backend import Attempt, Epoch, FinishReason, Task
from worker.backends.torch import TorchBackend
from worker.engine.encoder import Encoder, Text, load_encoder
from worker.engine.text_engine import QUEUE_BLOCKS, STEP_TOKENS, TextEngine

pytestmark = pytest.mark.torch

LABELS = ("bad", "so so", "good")
CPU = torch.device("cpu")


def texts(lengths: list[int], seed: int = 3) -> list[Text]:
    source = random.Random(seed)
    return [Text([source.randrange(3, len(WORDS)) for _ in range(length)]) for length in lengths]


def load(folder: Path) -> Encoder:
    encoder = load_encoder(folder, CPU)
    assert encoder is not None
    return encoder


def values(encoder: Encoder, wanted: list[Text]) -> list[list[float]]:
    with torch.inference_mode():
        return encoder.values(wanted)


def reference(model: Any, text: Text) -> Any:
    options = {}
    if text.first_tokens:
        kinds = [0] * text.first_tokens + [1] * (len(text.tokens) - text.first_tokens)
        options["token_type_ids"] = torch.tensor([kinds])
    with torch.inference_mode():
        return model(input_ids=torch.tensor([text.tokens]), **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", [LABELS, ("relevant",)], ids=["classify", "score"])
def test_a_classifier_gives_transformers_probabilities(family: str, labels: tuple[str, ...], tmp_path: Path) -> None:
    model = write_encoder(family, tmp_path, labels)
    encoder = load(tmp_path)
    wanted = texts([7, 3, 30, 7, 1])
    if family in ("bert", "electra"):
        wanted.append(Text(wanted[2].tokens, 11))
    logits = [reference(model, text).logits[0] for text in wanted]
    expected = [row.sigmoid() if len(labels) == 1 else row.softmax(-1) for row in logits]
    torch.testing.assert_close(torch.tensor(values(encoder, wanted)), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert encoder.tasks == {Task.SCORE if len(labels) == 1 else Task.CLASSIFY}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "max_tokens", ""])
def test_a_vector_is_what_sentence_transformers_makes(family: str, pooling: str, tmp_path: Path) -> None:
    model = write_encoder(family, tmp_path, pooling=pooling)
    if pooling:
        shutil.move(tmp_path / "1_Pooling" / "config.json", tmp_path / "pooling.json")
    encoder = load(tmp_path)
    wanted = texts([5, 40, 5, 2])
    rows = [reference(model, text).last_hidden_state[0] for text in wanted]
    pooled = {"cls_token": lambda r: r[0], "max_tokens": lambda r: r.amax(0)}.get(pooling, lambda r: r.mean(0))
    expected = torch.stack([pooled(row) for row in rows])
    if pooling:
        expected = torch.nn.functional.normalize(expected, dim=1)
        assert encoder.context_length == CONTEXT - 6
    torch.testing.assert_close(torch.tensor(values(encoder, wanted)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "labels"), [("bert", ()), ("roberta", LABELS), ("electra", LABELS)])
def test_a_text_has_the_same_bits_alone_and_in_any_batch(family: str, labels: tuple[str, ...], tmp_path: Path) -> None:
    write_encoder(family, tmp_path, labels)
    encoder = load(tmp_path)
    wanted = texts([1, 2, 3, 7, 7, 9, 17, 33, 64, 90, 7])
    source = random.Random(5)
    together = values(encoder, wanted)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert [values(encoder, [text])[0] for text in wanted] == together
        for _ in range(3):
            chosen = source.sample(range(len(wanted)), source.randint(2, len(wanted)))
            assert values(encoder, [wanted[n] for n in chosen]) == [together[n] for n in chosen]
    torch.set_num_threads(1)


def attempt(name: str, tokens: int, *, priority: int = 1, epoch: int = 1, task: Task = Task.EMBED) -> Attempt:
    prompt = texts([tokens], seed=tokens)[0].tokens
    return Attempt(name, Epoch(1, epoch), "tiny", prompt, 1, priority=priority, task=task)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("tiny")
    write_encoder("bert", folder)
    return load(folder)


@pytest.fixture
def engine(encoder: Encoder) -> TextEngine:
    return TextEngine(encoder, ManualClock())


def names(engine: TextEngine) -> list[str]:
    return [output.request_id for output in engine.step().outputs]


def test_a_step_is_bounded_in_tokens_and_the_urgent_go_first(engine: TextEngine) -> None:
    length = STEP_TOKENS // 6
    for number in range(8):
        engine.admit(attempt(f"batch{number}", length, priority=2))
    engine.admit(attempt("now", length, priority=0))
    assert engine.blocks().free == QUEUE_BLOCKS - 9 * -(-length // 64)
    assert names(engine) == ["now", *(f"batch{number}" for number in range(5))]
    assert names(engine) == ["batch5", "batch6", "batch7"]
    assert not engine.busy()
    assert engine.blocks().free == engine.blocks().total == QUEUE_BLOCKS


def test_the_one_output_ends_the_attempt(engine: TextEngine, encoder: Encoder) -> None:
    engine.admit(attempt("one", 9, epoch=4))
    assert engine.epoch("one") == (1, 4)
    result = engine.step()
    (output,) = result.outputs
    assert (output.choice, output.index, output.token_ids) == (0, 0, ())
    assert (output.finish, output.epoch) == (FinishReason.STOP, Epoch(1, 4))
    assert output.values == values(encoder, [Text(attempt("one", 9).prompt)])[0]
    assert [stage.tokens for stage in result.stages] == [9]
    assert engine.epoch("one") is None


def test_a_cancelled_text_is_not_computed(engine: TextEngine) -> None:
    for name in ("a", "b", "c"):
        engine.admit(attempt(name, 5))
    engine.cancel("b", None, None)
    engine.cancel("c", 0, 1)  # the only output is still wanted
    engine.cancel("unknown", None, None)
    assert names(engine) == ["a", "c"]


def test_what_an_encoder_cannot_do_is_refused(engine: TextEngine) -> None:
    with pytest.raises(UnsupportedFeature):
        engine.admit(attempt("chat", 5, task=Task.GENERATE))
    with pytest.raises(UnsupportedFeature):
        engine.admit(attempt("label", 5, task=Task.CLASSIFY))
    with pytest.raises(PromptTooLong):
        engine.admit(attempt("long", CONTEXT + 1))
    assert not engine.busy()


def test_values_that_are_no_numbers_fail_their_attempt_alone(tmp_path: Path) -> None:
    write_encoder("bert", tmp_path)
    encoder = load(tmp_path)
    broken = TextEngine(encoder, ManualClock())
    with torch.inference_mode():
        encoder.base.embeddings.word_embeddings.weight[50] = float("nan")  # type: ignore[union-attr, index]
    broken.admit(Attempt("bad", Epoch(1, 1), "tiny", [1, 50, 2], 1, task=Task.EMBED))
    broken.admit(Attempt("good", Epoch(1, 1), "tiny", [1, 51, 2], 1, task=Task.EMBED))
    result = broken.step()
    assert [failure.request_id for failure in result.failures] == ["bad"]
    assert [output.request_id for output in result.outputs] == ["good"]


def test_the_backend_serves_encoders_beside_decoders(tmp_path: Path) -> None:
    from tests.integration.engine.tiny import write
    from worker.backend import ModelSpec

    write("llama", tmp_path / "llama")
    write_encoder("bert", tmp_path / "bert", pooling="mean_tokens")
    backend = TorchBackend(threads=1)
    backend.load(ModelSpec("llama", "v", tmp_path / "llama"), 64 << 20)
    assert backend.load(ModelSpec("tiny", "v", tmp_path / "bert"), 64 << 20).free == QUEUE_BLOCKS
    backend.admit(Attempt("story", Epoch(1, 1), "llama", [1, 2, 3], 6))
    for number in range(60):
        backend.admit(attempt(f"text{number}", 60))
    tokens, vectors, steps = 0, 0, 0
    while backend.busy():
        outputs = backend.step().outputs
        tokens += sum(len(output.token_ids) for output in outputs)
        vectors += sum(bool(output.values) for output in outputs)
        steps += 1
        assert tokens == min(steps, 6), "a flood of texts must not hold up a stream"
    assert vectors == 60
    with pytest.raises(UnsupportedFeature):
        backend.admit(Attempt("vector", Epoch(1, 1), "llama", [1, 2], 1, task=Task.EMBED))

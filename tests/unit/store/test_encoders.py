"""What an encoder's folder says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmos.errors import SourceError
from llmos.store.encoders import EncoderFacts, read_encoder
from llmos.store.payload import stored_name

BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
CLASSIFIER = BERT | {"architectures": ["BertForSequenceClassification"]}
LAYERS = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")]


def facts(folder: Path, config: dict[str, Any], **files: Any) -> EncoderFacts | None:
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return read_encoder(folder)


def test_a_sentence_transformer(tmp_path: Path) -> None:
    found = facts(
        tmp_path,
        BERT | {"matryoshka_dimensions": [4, 8, 16, 99]},
        modules=LAYERS,
        pooling={"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        sentence_bert_config={"max_seq_length": 256},
    )
    assert found == EncoderFacts(("embed",), 256, "cls", normalize=True, dimensions=(16, 8, 4))


def test_a_bare_encoder_is_pooled_by_the_mean(tmp_path: Path) -> None:
    assert facts(tmp_path, BERT) == EncoderFacts(("embed",), 512, "mean", dimensions=(16,))


def test_positions_that_begin_after_the_padding(tmp_path: Path) -> None:
    found = facts(tmp_path, BERT | {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1})
    assert found is not None
    assert found.context_length == 512


def test_classifiers_and_cross_encoders(tmp_path: Path) -> None:
    named = {str(number): f"label {number}" for number in range(11)}
    many = facts(tmp_path, CLASSIFIER | {"id2label": named, "problem_type": "multi_label_classification"})
    assert many == EncoderFacts(("classify",), 512, labels=tuple(named.values()), independent_labels=True)
    one = facts(tmp_path, CLASSIFIER | {"id2label": {"0": "LABEL_0"}})
    assert one == EncoderFacts(("score",), 512, labels=("LABEL_0",))
    unnamed = facts(tmp_path, CLASSIFIER)
    assert unnamed is not None
    assert unnamed.labels == ("LABEL_0", "LABEL_1")


def test_a_decoder_is_no_encoder(tmp_path: Path) -> None:
    assert facts(tmp_path, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}) is None


@pytest.mark.parametrize(
    ("config", "files", "said"),
    [
        ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, {}, "classifiers"),
        (BERT, {"modules": [*LAYERS, {"type": "sentence_transformers.models.Dense"}]}, "Dense"),
        (BERT, {"modules": {"type": 3}}, "not a list"),
        (BERT, {"pooling": {"pooling_mode_weightedmean_tokens": True}}, "pools"),
        (BERT, {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, "pools"),
        (BERT | {"max_position_embeddings": 1, "model_type": "roberta"}, {}, "no position"),
        ({"model_type": "bert"}, {}, "hidden_size"),
    ],
)
def test_what_cannot_be_served_is_refused(config: Any, files: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=said):
        facts(tmp_path, config, **files)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("config.json", "config.json"),
        ("pkg/model/config.json", "config.json"),
        ("pkg/model/1_Pooling/config.json", "pooling.json"),
        ("1_Pooling/config.json", "pooling.json"),
        ("2_Dense/model.safetensors", None),
        ("2_Dense/config.json", None),
        ("pooling/config.json", "config.json"),
    ],
)
def test_names_under_which_files_are_kept(path: str, name: str | None) -> None:
    assert stored_name(path) == name

"""Tiny random encoders of several families, written as model folders with a tokenizer. Needs the worker extra."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

FAMILIES = ("bert", "roberta", "distilbert", "electra")
WORDS = ("<pad>", "<cls>", "<sep>", "<unk>", *(f"w{number}" for number in range(93)))
CONTEXT = 96
_SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 0, "initializer_range": 0.3}
# 67: an odd width, so that the last vector of an activation moves with the number of rows.
_BERT: dict[str, Any] = {
    **_SIZES,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 67,
    "max_position_embeddings": CONTEXT,
}


def _config(family: str, labels: Sequence[str]) -> Any:
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    options = named if labels else {}
    match family:
        case "bert":
            return transformers.BertConfig(**_BERT, **options)
        case "roberta":
            return transformers.RobertaConfig(**_BERT | {"type_vocab_size": 1}, **options)
        case "electra":
            return transformers.ElectraConfig(**_BERT, embedding_size=24, **options)
        case "distilbert":
            sizes = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 67, "max_position_embeddings": CONTEXT}
            return transformers.DistilBertConfig(**_SIZES, **sizes, **options)
    raise ValueError(family)


def write_encoder(family: str, folder: Path, labels: Sequence[str] = (), pooling: str = "") -> Any:
    """Write a model folder; returns transformers' own model of it, in evaluation mode.

    With `labels` a classifier; else an encoder with sentence-transformers' files if `pooling` (`mean_tokens`) is given.
    """
    torch.manual_seed(1)
    kind = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModel
    model = kind.from_config(_config(family, labels), attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    if pooling:
        _write_layers(folder, pooling)
    return model.eval()


def tokenizer() -> Tokenizer:
    """One token per word of `WORDS`, with BERT's pairs."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[("<cls>", 1), ("<sep>", 2)],
    )
    return made


def _write_layers(folder: Path, pooling: str) -> None:
    names = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in names]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": CONTEXT - 6}))

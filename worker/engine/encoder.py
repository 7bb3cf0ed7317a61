"""An encoder from a folder: transformers' own modules, every text by itself; of each a vector, labels or a score.

Texts lie one after another in one row of tokens, so that nothing is padded and every product sees all of them.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llmos.errors import SourceError, UnsupportedFeature
from llmos.store.encoders import EncoderFacts, Pooling, read_encoder
from worker.backend import Task
from worker.engine import text_attention
from worker.engine.layers import FixedRowLinear, steady_layers, unknown_weights
from worker.engine.text_attention import TextAttention

log = logging.getLogger(__name__)

_TASKS = {"embed": Task.EMBED, "classify": Task.CLASSIFY, "score": Task.SCORE}
_PROBE = ((5, 6, 7, 8, 9, 10), (11, 12, 13))
"""Tokens of texts that every model can take."""
_TOLERANCE = 1e-3
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True, slots=True)
class Text:
    """What a vector, or probabilities, are made of: one text, or two with `first_tokens` as the length of the first."""

    tokens: Sequence[int]
    first_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Encoder:
    """A loaded model. Call under `torch.inference_mode`, from one thread."""

    facts: EncoderFacts
    base: nn.Module
    head: Callable[[Tensor], Tensor] | None
    """From the first row of each text, [texts, hidden], to logits; None: the rows are pooled to a vector."""
    padding_position: int | None
    """Set: positions count from the one after it, and tokens of this id have none."""
    has_types: bool
    """The model tells a first text from a second one."""
    vocabulary: int
    context_length: int
    device: torch.device
    weight_bytes: int

    @property
    def tasks(self) -> frozenset[Task]:
        """What it can be asked for."""
        return frozenset(_TASKS[capability] for capability in self.facts.capabilities)

    def values(self, texts: Sequence[Text]) -> list[list[float]]:
        """A vector, the labels' probabilities, or one score of each text: from 0 to 1, a score too."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number].tokens))
        rows = self.raw([texts[number] for number in order]).tolist()
        values: list[list[float]] = [[]] * len(texts)
        for number, row in zip(order, rows, strict=True):
            values[number] = row if self.head is None else self._probabilities(row)
        return values

    def raw(self, texts: Sequence[Text]) -> Tensor:
        """Vectors or logits: [texts, size]. Texts of one length should be neighbours."""
        lengths = [len(text.tokens) for text in texts]
        rows = self._rows(texts, lengths)
        ends = torch.tensor(lengths, device=self.device).cumsum(0)
        starts = ends - torch.tensor(lengths, device=self.device)
        if self.head is not None:
            return self.head(rows.index_select(0, starts))
        vectors = _pooled(rows, lengths, starts, self.facts.pooling)
        if not self.facts.normalize:
            return vectors
        return vectors / vectors.pow(2).sum(-1, keepdim=True).sqrt().clamp_min(_SMALLEST_NORM)

    def _rows(self, texts: Sequence[Text], lengths: Sequence[int]) -> Tensor:
        """The last layer's output, [tokens of all texts, hidden]."""
        inputs = {
            "input_ids": [token for text in texts for token in text.tokens],
            "position_ids": [position for text in texts for position in self._positions(text)],
        }
        if self.has_types:
            inputs["token_type_ids"] = [kind for text in texts for kind in _types(text)]
        tensors = {name: torch.tensor([ids], device=self.device) for name, ids in inputs.items()}
        rows: Tensor = self.base(**tensors, texts=TextAttention(lengths)).last_hidden_state[0]
        return rows

    def _positions(self, text: Text) -> Sequence[int]:
        padding = self.padding_position
        if padding is None:
            return range(len(text.tokens))
        positions, last = [], padding
        for token in text.tokens:
            last += token != padding
            positions.append(padding if token == padding else last)
        return positions

    def _probabilities(self, logits: Sequence[float]) -> list[float]:
        # In Python: torch's element-wise functions may round by the place of an element in the batch.
        if len(logits) == 1 or self.facts.independent_labels:
            return [_sigmoid(logit) for logit in logits]
        highest = max(logits)
        weights = [math.exp(logit - highest) for logit in logits]
        total = math.fsum(weights)
        return [weight / total for weight in weights]


def _types(text: Text) -> list[int]:
    first = text.first_tokens or len(text.tokens)
    return [0] * first + [1] * (len(text.tokens) - first)


def _sigmoid(logit: float) -> float:
    small = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else small) / (1.0 + small)


def _pooled(rows: Tensor, lengths: Sequence[int], starts: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "cls":
        return rows.index_select(0, starts)
    if pooling == "max":
        return torch.stack([part.amax(0) for part in torch.split(rows, list(lengths))])
    # A bag adds its rows one by one, whatever else is in the batch.
    sums = nnf.embedding_bag(torch.arange(rows.shape[0], device=rows.device), rows, starts, mode="sum")
    counts = torch.tensor(lengths, dtype=rows.dtype, device=rows.device)[:, None]
    return sums / (counts.sqrt() if pooling == "mean_sqrt_len" else counts)


def load_encoder(folder: Path, device: torch.device, context_length: int = 0) -> Encoder | None:
    """The encoder in a folder of safetensors and config.json, in fp32; None if the folder holds another kind of model.

    `context_length` lowers the model's own limit; 0 keeps it. Raises SourceError or UnsupportedFeature.
    """
    facts = read_encoder(folder)
    if facts is None:
        return None
    text_attention.register()
    transformers.utils.logging.disable_progress_bar()
    model = _read(folder, facts).to(device).eval().requires_grad_(False)
    probe = [Text(tokens) for tokens in _PROBE]
    with torch.inference_mode():
        expected = [_reference(model, text, device) for text in probe]
        encoder = _prepare(model, facts, device, min(filter(None, (facts.context_length, context_length))))
        _check(encoder, probe, expected, type(model).__name__)
    return encoder


def _read(folder: Path, facts: EncoderFacts) -> Any:
    kind = transformers.AutoModelForSequenceClassification if facts.labels else transformers.AutoModel
    try:
        model, report = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        log.warning("%s cannot be loaded: %s", folder, error)
        raise SourceError("The model's folder holds no encoder that transformers can load.") from error
    missing = [name for name in report["missing_keys"] if facts.labels or not name.startswith("pooler.")]
    # transformers would go on with random numbers in their place.
    if missing or report["mismatched_keys"]:
        raise SourceError("The model's files lack weights that it needs, or hold them in another shape.")
    if facts.labels and model.config.num_labels != len(facts.labels):
        raise SourceError("The model has another number of labels than it has names for.")
    return model


def _reference(model: Any, text: Text, device: torch.device) -> Tensor:
    """What transformers makes of one text before anything is changed."""
    out = model(input_ids=torch.tensor([text.tokens], device=device))
    result: Tensor = out.logits[0] if "logits" in out else out.last_hidden_state[0]
    return result


def _prepare(model: Any, facts: EncoderFacts, device: torch.device, context_length: int) -> Encoder:
    """Change a model that was read, in place, so that its texts do not depend on each other."""
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedFeature(f"{name} does not let its attention be replaced.")
    steady_layers(model, wide=True)
    if strange := unknown_weights(model):
        raise UnsupportedFeature(f"The torch backend cannot run layers like {strange[0]} yet.")
    model.set_attn_implementation(text_attention.IMPLEMENTATION)
    base, config = model.base_model, model.config
    head = _head(model, base) if facts.labels else None
    if hasattr(base, "pooler"):
        base.pooler = None  # taken by the head, or not needed
    embeddings = base.embeddings
    counted = hasattr(embeddings, "create_position_ids_from_input_ids")
    accepts_types = "token_type_ids" in inspect.signature(base.forward).parameters
    return Encoder(
        facts=facts,
        base=base,
        head=head,
        padding_position=int(embeddings.padding_idx) if counted else None,
        has_types=accepts_types and getattr(config, "type_vocab_size", 0) > 1,
        vocabulary=config.vocab_size,
        context_length=context_length,
        device=device,
        weight_bytes=_weight_bytes(model),
    )


class _Given(nn.Module):
    """Stands in for a classifier's encoder: gives what has been computed."""

    def __init__(self) -> None:
        super().__init__()
        self.output: BaseModelOutputWithPooling | None = None

    def forward(self, *inputs: Any, **options: Any) -> BaseModelOutputWithPooling | None:
        """Whatever the inputs."""
        return self.output


def _head(model: Any, base: Any) -> Callable[[Tensor], Tensor]:
    """The classifier's own forward, from each text's first row on."""
    given, pooler = _Given(), getattr(base, "pooler", None)
    setattr(model, model.base_model_prefix, given)

    def logits(first: Tensor) -> Tensor:
        states = first[:, None]
        pooled = None if pooler is None else pooler(states)
        given.output = BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)
        out: Tensor = model(input_ids=torch.zeros(first.shape[0], 1, dtype=torch.int64, device=first.device)).logits
        return out

    return logits


def _check(encoder: Encoder, texts: Sequence[Text], expected: Sequence[Tensor], name: str) -> None:
    """A model whose rows, or logits, are no longer what transformers gives is not served."""
    try:
        lengths = [len(text.tokens) for text in texts]
        if encoder.head is None:
            found: Sequence[Tensor] = torch.split(encoder._rows(texts, lengths), lengths)
        else:
            found = list(encoder.raw(texts))
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedFeature(f"{name} does not run on texts side by side: {error}") from error
    if not all(torch.allclose(*pair, rtol=_TOLERANCE, atol=_TOLERANCE) for pair in zip(found, expected, strict=True)):
        raise UnsupportedFeature(f"{name} gives other values on texts side by side than on each alone.")


def _weight_bytes(model: nn.Module) -> int:
    linears = sum(module.weight_bytes for module in model.modules() if isinstance(module, FixedRowLinear))
    return linears + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

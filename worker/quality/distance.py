"""How far one model's next-token distributions are from another's, over every position of some texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worker.engine.attention import KVRow
from worker.engine.kv import BLOCK_TOKENS
from worker.engine.paged import Servable

CHUNK_ROWS = 128
"""Logits of a large vocabulary are not kept for all positions at once."""

Logits = Callable[[Sequence[int]], Iterator[Tensor]]
"""Logits of all positions of a text, float32 [at most CHUNK_ROWS, vocabulary] at a time."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Of a candidate from a reference, in means over all positions."""

    kl: float
    """Kullback-Leibler divergence of the candidate's distributions from the reference's, nats per token."""
    perplexity: float
    """Of the candidate, on the texts' own tokens."""
    reference_perplexity: float
    agreement: float
    """Share of positions whose most likely token is the same."""
    tokens: int

    @property
    def perplexity_ratio(self) -> float:
        """Candidate to reference."""
        return self.perplexity / self.reference_perplexity


@torch.inference_mode()
def distance(
    reference: Logits,
    candidate: Logits,
    texts: Iterable[Sequence[int]],
    advance: Callable[[int], None] = lambda _: None,
) -> Distance:
    """Compare over texts of two tokens and more. `advance` gets the number of positions done, chunk by chunk."""
    divergence = agreed = ours = theirs = 0.0
    positions = predicted = 0
    for text in texts:
        following, first = torch.tensor(text[1:]), 0
        for expected, found in zip(reference(text), candidate(text), strict=True):
            truth, guess = expected.log_softmax(-1), found.log_softmax(-1)
            divergence += float((truth.exp() * (truth - guess)).sum())
            agreed += float((truth.argmax(-1) == guess.argmax(-1)).sum())
            targets = following[first : first + len(truth), None]
            theirs += float(truth[: len(targets)].gather(1, targets).sum())
            ours += float(guess[: len(targets)].gather(1, targets).sum())
            first += len(truth)
            predicted += len(targets)
            advance(len(truth))
        positions += first
    return Distance(
        kl=divergence / positions,
        perplexity=math.exp(-ours / predicted),
        reference_perplexity=math.exp(-theirs / predicted),
        agreement=agreed / positions,
        tokens=positions,
    )


def of_transformers(model: Any) -> Logits:
    """transformers' own model, with its own attention and cache."""

    def logits(text: Sequence[int]) -> Iterator[Tensor]:
        cache = None
        for first in range(0, len(text), CHUNK_ROWS):
            ids = torch.tensor([text[first : first + CHUNK_ROWS]])
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            yield out.logits[0].float()

    return logits


def of_decoder(decoder: Servable) -> Logits:
    """What the step loop runs, in steps of CHUNK_ROWS rows."""

    def logits(text: Sequence[int]) -> Iterator[Tensor]:
        paged = decoder.with_memory(-(-len(text) // BLOCK_TOKENS))
        slots = paged.memory.slots(range(-(-len(text) // BLOCK_TOKENS)))
        for first in range(0, len(text), CHUNK_ROWS):
            places = range(first, min(first + CHUNK_ROWS, len(text)))
            rows = [KVRow(slots, place + 1) for place in places]
            yield paged.forward([text[place] for place in places], places, rows, range(len(places)))

    return logits

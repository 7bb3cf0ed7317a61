"""Picks the next token of each row: a pure function of the row's logits, its tokens, its seed, choice and index.

Randomness is Gumbel noise keyed by the token id (the Gumbel-max trick): the pick is the argmax of
`logits / temperature + gumbel(seed, choice, index, token)`. No state is kept, so a resumed or drafted token is the same
token. Rows are computed together, yet none depends on another: every operation here works row by row, whatever the
number of rows and threads (`docs/decisions/0005-exactness-in-fp32.md`).

Order, as in vLLM: logit bias, stop tokens barred by `min_tokens`, what a grammar allows, repetition penalty (over
prompt and answer), frequency and presence penalty (over the answer), temperature, min-p, top-k, top-p. A filter is a
threshold: values that tie with the last one kept are kept too. Greedy ties go to the lowest token id. Logprobs are
those of the model's own logits, before any of this (vLLM's `raw_logprobs`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.backend import Sampling, TokenLogprob
from worker.engine.philox import gumbel, token_words

_NUCLEUS_FIRST = 1024
"""Candidates that top-p looks at first; sorting a whole vocabulary takes milliseconds."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What decides a pick besides the logits."""

    sampling: Sampling
    choice: int
    prompt: Sequence[int]
    generated: Sequence[int]
    """Tokens of this choice so far; the index of the pick is their number."""
    barred: Collection[int] = ()
    """Token ids that must not be picked."""
    allowed: Tensor | None = None
    """Which tokens may be picked, bool [vocabulary], at least one of them; None: all."""

    @property
    def index(self) -> int:
        """Position of the picked token within its choice."""
        return len(self.generated)


@dataclass(frozen=True, slots=True)
class Pick:
    """The token picked for a row. `logprob` is None unless asked for."""

    token_id: int
    logprob: TokenLogprob | None = None


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Pick | None]:
    """One pick per row of `logits` ([rows, vocabulary], float32, not modified); None where a logit is not a number."""
    sound = torch.isfinite(logits.amax(-1)).tolist()
    adjusted = logits
    if any(map(_adjusts, rows)):
        adjusted = logits.clone()
        for values, row in zip(adjusted, rows, strict=True):
            _adjust(values, row)
    tokens = adjusted.argmax(-1).tolist()
    drawn = [number for number, row in enumerate(rows) if row.sampling.temperature > 0 and sound[number]]
    if drawn:
        picked = _draw(adjusted[drawn], [rows[number] for number in drawn])
        tokens = [*tokens]
        for number, token in zip(drawn, picked, strict=True):
            tokens[number] = token
    return [
        Pick(tokens[number], _logprob(logits[number], tokens[number], row.sampling.logprobs)) if sound[number] else None
        for number, row in enumerate(rows)
    ]


def _adjusts(row: SamplingRow) -> bool:
    options = row.sampling
    return bool(
        row.barred
        or row.allowed is not None
        or options.logit_bias
        or options.presence_penalty
        or options.frequency_penalty
        or options.repetition_penalty != 1.0
    )


def _adjust(values: Tensor, row: SamplingRow) -> None:
    """Bias, bars and penalties, in place on one row."""
    options = row.sampling
    if options.logit_bias:
        ids = torch.tensor(list(options.logit_bias), device=values.device)
        values[ids] += torch.tensor(list(options.logit_bias.values()), dtype=values.dtype, device=values.device)
    if row.barred:
        values[torch.tensor(sorted(row.barred), device=values.device)] = -math.inf
    if row.allowed is not None:
        values.masked_fill_(row.allowed.logical_not().to(values.device), -math.inf)
    if options.repetition_penalty != 1.0:
        ids = torch.tensor(sorted({*row.prompt, *row.generated}), device=values.device)
        seen = values[ids]
        penalty = options.repetition_penalty
        values[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if row.generated and (options.frequency_penalty or options.presence_penalty):
        counts = Counter(row.generated)
        ids = torch.tensor(list(counts), device=values.device)
        times = torch.tensor(list(counts.values()), dtype=values.dtype, device=values.device)
        values[ids] -= options.frequency_penalty * times + options.presence_penalty


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Gumbel-max over the tokens that the filters keep."""

    def column(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=logits.device)

    temperatures = torch.tensor(
        [row.sampling.temperature for row in rows], dtype=torch.float64, device=logits.device
    ).unsqueeze(1)
    scores = logits.double().div_(temperatures)
    for values, row in zip(scores, rows, strict=True):
        _keep(values, row.sampling)
    words = token_words(
        column([_signed(row.sampling.seed) for row in rows]),
        column([row.choice for row in rows]),
        column([row.index for row in rows]),
        logits.shape[-1],
    )
    tokens: list[int] = scores.add_(gumbel(words)).argmax(-1).tolist()
    return tokens


def _signed(seed: int) -> int:
    seed &= 0xFFFFFFFFFFFFFFFF
    return seed - (1 << 64) if seed >> 63 else seed


def _keep(values: Tensor, options: Sampling) -> None:
    """Set what min-p, top-k and top-p leave out to minus infinity, in place on one row of scaled logits."""
    if options.min_p > 0:
        _cut(values, float(values.amax()) + math.log(options.min_p))
    if 0 < options.top_k < values.shape[0]:
        _cut(values, float(values.topk(options.top_k).values[-1]))
    if options.top_p < 1:
        # softmax sums a row in one thread; a plain sum of a long row would depend on the number of threads.
        probabilities = values.softmax(-1)
        values.masked_fill_(probabilities < _nucleus_threshold(probabilities, options.top_p), -math.inf)


def _cut(values: Tensor, threshold: float) -> None:
    values.masked_fill_(values < threshold, -math.inf)


def _nucleus_threshold(probabilities: Tensor, top_p: float) -> float:
    """Least probability in the smallest set of likeliest tokens that together reach `top_p`; never an empty set."""
    count = min(_NUCLEUS_FIRST, probabilities.shape[0])
    while True:
        likeliest = probabilities.topk(count).values
        inside = 1 + int((likeliest.cumsum(0)[:-1] < top_p).sum())
        if inside < count or count == probabilities.shape[0]:
            return float(likeliest[inside - 1])
        count = min(count * 4, probabilities.shape[0])


def _logprob(logits: Tensor, token: int, count: int | None) -> TokenLogprob | None:
    if count is None:
        return None
    values = logits.log_softmax(-1)
    top: list[tuple[int, float]] = []
    if count:
        count = min(count, values.shape[0])
        ids = torch.nonzero(values >= values.topk(count).values[-1]).flatten().tolist()
        top = sorted(((number, float(values[number])) for number in ids), key=lambda entry: (-entry[1], entry[0]))
    return TokenLogprob(token, float(values[token]), top[:count])

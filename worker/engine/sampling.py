"""Picks the next token of each row: a pure function of the row's logits, its tokens, its seed, choice and index.

Randomness is Gumbel noise keyed by the token id (the Gumbel-max trick): the pick is the argmax of
`logits / temperature + gumbel(seed, choice, index, token)`. No state is kept, so a resumed or drafted token is the same
token. Rows are computed together, yet none depends on another: every operation here works row by row, whatever the
number of rows and threads (`docs/decisions/0005-exactness-in-fp32.md`). The kernels pick where they are at hand, torch
(`worker/engine/drawing.py`) elsewhere: both give the same tokens, because every operation that decides one has one
result. On CUDA the noise may differ from theirs in its last bit; it is the same every time.

Order, as in vLLM: logit bias, stop tokens barred by `min_tokens`, what a grammar allows, repetition penalty (over
prompt and answer), frequency and presence penalty (over the answer), temperature, min-p, top-k, top-p. A filter is a
threshold: values that tie with the last one kept are kept too. Greedy ties go to the lowest token id. Logprobs are
those of the model's own logits, before any of this (vLLM's `raw_logprobs`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.backend import Sampling, TokenLogprob
from worker.engine.drawing import Draw, draw
from worker.kernels import Kernels, abi, present

_LEAST_TEMPERATURE = 1e-6
"""What lies below is taken for it: nothing but the likeliest tokens can be drawn, and no quotient is infinite."""


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
    adjusted: dict[int, Tensor] = {}
    for number, row in enumerate(rows):
        if _adjusts(row):
            adjusted[number] = _copy(logits[number])
            _adjust(adjusted[number], row)
    kernels = present() if logits.device.type == "cpu" and logits.stride(-1) == 1 else None
    if kernels is None:
        tokens = _pick_with_torch(logits, adjusted, rows)
    else:
        tokens = _pick_with_kernels(kernels, logits, adjusted, rows)
    return [
        None if token is None else Pick(token, _logprob(logits, number, token, row.sampling.logprobs))
        for number, (token, row) in enumerate(zip(tokens, rows, strict=True))
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
        _keep_only(values, row.allowed)
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


# One thread on the CPU: torch would wake its others for a row of a large vocabulary, which takes longer than the work.


def _copy(values: Tensor) -> Tensor:
    return torch.from_numpy(values.numpy().copy()) if values.device.type == "cpu" else values.clone()


def _keep_only(values: Tensor, allowed: Tensor) -> None:
    if values.device.type == "cpu":
        np.copyto(values.numpy(), -np.inf, where=~allowed.numpy())
    else:
        values.masked_fill_(~allowed.to(values.device), -math.inf)


def _pick_with_kernels(
    kernels: Kernels, logits: Tensor, adjusted: Mapping[int, Tensor], rows: Sequence[SamplingRow]
) -> list[int | None]:
    calls = (abi.PickRow * len(rows))()
    address, stride = logits.data_ptr(), logits.stride(0) * logits.itemsize
    for number, row in enumerate(rows):
        raw = address + number * stride
        chosen = adjusted[number].data_ptr() if number in adjusted else raw
        if row.sampling.temperature > 0:
            how = _draw_of(row)
            drawn = (how.temperature, how.top_p, how.log_min_p, how.seed, how.choice, how.index, how.top_k)
            calls[number] = abi.PickRow(chosen, raw, *drawn)
        else:
            calls[number] = abi.PickRow(chosen, raw)
    return kernels.pick(calls, logits.shape[-1])


def _pick_with_torch(logits: Tensor, adjusted: Mapping[int, Tensor], rows: Sequence[SamplingRow]) -> list[int | None]:
    sound = torch.isfinite(logits.amax(-1)).tolist()
    if adjusted:
        logits = torch.stack([adjusted.get(number, values) for number, values in enumerate(logits)])
    tokens: list[int | None] = logits.argmax(-1).tolist()
    drawn = [number for number, row in enumerate(rows) if row.sampling.temperature > 0 and sound[number]]
    if drawn:
        for number, token in zip(drawn, draw(logits[drawn], [_draw_of(rows[number]) for number in drawn]), strict=True):
            tokens[number] = token
    return [token if fine else None for token, fine in zip(tokens, sound, strict=True)]


def _draw_of(row: SamplingRow) -> Draw:
    options = row.sampling
    return Draw(
        temperature=max(options.temperature, _LEAST_TEMPERATURE) if options.temperature > 0 else 0.0,
        top_k=options.top_k,
        top_p=options.top_p,
        log_min_p=math.log(options.min_p) if options.min_p > 0 else -math.inf,
        seed=options.seed & 0xFFFFFFFFFFFFFFFF,
        choice=row.choice,
        index=row.index,
    )


def _logprob(logits: Tensor, number: int, token: int, count: int | None) -> TokenLogprob | None:
    if count is None:
        return None
    values = logits[number].log_softmax(-1)
    top: list[tuple[int, float]] = []
    if count:
        count = min(count, values.shape[0])
        ids = torch.nonzero(values >= values.topk(count).values[-1]).flatten().tolist()
        top = sorted(((number, float(values[number])) for number in ids), key=lambda entry: (-entry[1], entry[0]))
    return TokenLogprob(token, float(values[token]), top[:count])

"""Where one choice stands in its grammar: what may come next, and whether anything can.

A function of the constraint and the choice's tokens alone: built anew from the tokens it gives the same masks, so that
it is never shipped, and a drafted token meets the mask that it would have met without drafting.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from llmos.errors import InvalidConstraint
from worker.engine.grammar.vocabulary import PARAM, Vocabulary, refusal


class Matcher:
    """Follows one choice. Not thread-safe.

    `ignore_eos`: the model's end tokens never are among what may come; the choice ends where the grammar does.
    """

    def __init__(self, start: LLMatcher, vocabulary: Vocabulary, *, ignore_eos: bool = False) -> None:
        """`start` is copied. Call `advance` with the tokens that are there, or none, before anything else."""
        self._state = start.deep_copy()
        self._vocabulary = vocabulary
        self._ignore_eos = ignore_eos
        self._mask = np.zeros(0, dtype=np.bool_)
        self._complete = False

    @property
    def complete(self) -> bool:
        """Whether the text is what was asked for and nothing but an end token could follow."""
        return self._complete

    def advance(self, tokens: Sequence[int]) -> None:
        """Take tokens that were picked. Raises InvalidConstraint where they, or the work they make, do not fit."""
        if tokens and not self._state.consume_tokens(list(tokens)):
            raise refusal(self._state)
        self._look()

    def allowed(self, barred: Collection[int] = ()) -> Tensor:
        """Which tokens may come next: bool, [vocabulary], owned by the caller; at least one unless `complete`.

        `barred` tokens are left out, unless nothing else is left: the grammar is stronger.
        """
        mask = self._mask.copy()
        mask[[token for token in barred if token < len(mask)]] = False
        return torch.from_numpy(mask if mask.any() else self._mask.copy())

    def _look(self) -> None:
        """Compute what may come next."""
        state, size = self._state, self._vocabulary.size
        bits = np.frombuffer(state.compute_bitmask(), dtype=np.uint8)
        if state.is_error():
            raise refusal(state)
        mask = np.unpackbits(bits, bitorder="little", count=max(size, bits.size * 8))[:size].view(np.bool_)
        accepting = state.is_accepting()
        ends = self._vocabulary.tokens.eos_tokens
        mask[ends] = False
        self._complete = accepting and not mask.any()
        if accepting and not self._ignore_eos:
            mask[sorted(self._vocabulary.end_tokens)] = True
        if not self._complete and not mask.any():
            raise InvalidConstraint("The constraint cannot be completed with this model's tokens.", param=PARAM)
        self._mask = mask

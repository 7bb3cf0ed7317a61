"""A request in a simulated engine, from its arrival there to its last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK_TOKENS = 64


def blocks_of(tokens: int) -> int:
    """KV blocks that hold so many tokens of one sequence."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass(slots=True, eq=False)
class Job:
    """One attempt. The engine changes what is not given to it."""

    id: str
    prompt: int
    """Tokens."""
    hashes: Sequence[int]
    """One per full block of the prompt."""
    answer: int
    """Tokens that it will have had when it ends; neither the engine nor a router looks at it before."""
    max_tokens: int
    order: tuple[int, int] = (0, 0)
    """Class, then arrival: who goes first. The engine sets the arrival."""
    produced: int = 0
    """Tokens of the answer so far; while it decodes, see `Engine`."""
    computed: int = 0
    """Positions whose keys and values are there while the prompt is computed."""
    cached: int = 0
    """Prompt tokens found in the prefix cache."""
    blocks: list[int] = field(default_factory=list)
    running: bool = False
    began: int = 0
    """Engine's count of decode steps at which it had `produced` tokens."""

    @property
    def known(self) -> int:
        """Tokens of prompt and answer, as of its last change of stage."""
        return self.prompt + self.produced

    @property
    def target(self) -> int:
        """Where its prefill is to get next: prompts first, then what was produced before a preemption."""
        return self.prompt if self.computed < self.prompt else self.known

    @property
    def usable(self) -> int:
        """Blocks that need not be computed if cached: at least the prompt's last token is."""
        return min(len(self.hashes), (self.prompt - 1) // BLOCK_TOKENS)

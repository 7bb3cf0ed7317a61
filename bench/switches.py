"""What our own switches bring and cost, against ourselves without them: drafting, and LoRA adapters in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from bench.corpus import Texts
from bench.rows import Row, at_least, in_turn
from bench.sides.calls import Tokens
from bench.sides.side import Side
from bench.sides.start import ours

PARAGRAPH = (
    "A lease says who is a member of the fleet; it does not say who is alive. A worker that has stopped computing "
    "keeps its lease for as long as its process renews it, so the scheduler looks at the step counter that "
    "arrives with every frame. When the counter stands still for longer than the bound that was learned from "
    "earlier steps, the requests of that worker are sent to another one, with all the tokens that they have "
    "produced so far. The client sees a short pause and then the same text that an undisturbed run would have "
    "given."
)
REPEATING = f"Edit this paragraph: replace the word worker by the word node, and change nothing else.\n\n{PARAGRAPH}"
FRESH = "Tell me a story about a lighthouse keeper."
ANSWER = 80
"""Tokens; the edited paragraph is a little longer."""
ADAPTERS, SEQUENCES, PROMPT, STEPS = 8, 16, 32, 32
REPEATING_AIM, FRESH_AIM, ADAPTERS_AIM = 1.8, 0.97, 0.8


def rows(label: str, files: Path, precision: str, rounds: int, only: str) -> Iterator[Row]:
    """Of one instruction-tuned model of SmolLM2's chat format."""
    names = [
        f"{label}: drafting, text that repeats its prompt",
        f"{label}: drafting, text that does not",
        f"{label}: decode, {SEQUENCES} sequences, {ADAPTERS} adapters",
    ]
    repeating, fresh, adapters = ([name] if only in name else [] for name in names)
    if not (repeating or fresh or adapters):
        return
    with ours(files, precision) as plain:
        if repeating or fresh:
            with ours(files, precision, drafting=True) as drafting:
                for name in repeating:
                    yield _drafting(name, drafting, plain, chat(files, REPEATING), 0.0, rounds, REPEATING_AIM)
                for name in fresh:
                    yield _drafting(name, drafting, plain, chat(files, FRESH), 1.0, rounds, FRESH_AIM)
        for name in adapters:
            yield _adapters(name, plain, Texts(files), rounds)


def chat(files: Path, message: str) -> Tokens:
    """A prompt in ChatML."""
    text = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
    found: Tokens = Tokenizer.from_file(str(files / "tokenizer.json")).encode(text).ids
    return found


def _drafting(
    name: str, drafting: Side, plain: Side, prompt: Tokens, temperature: float, rounds: int, aim: float
) -> Row:
    """One sequence; every round has a seed of its own, the same for both."""

    def speed(one: Side, number: int) -> float:
        done = one.call("generate", prompt=prompt, max_tokens=ANSWER, temperature=temperature, seed=number)
        return float(done["tokens"] / done["seconds"])

    for one in (drafting, plain):
        speed(one, rounds)
    found = in_turn(rounds, [lambda number: speed(drafting, number), lambda number: speed(plain, number)])
    return at_least(name, "tokens/s", found[0], found[1], aim)


def _adapters(name: str, one: Side, texts: Texts, rounds: int) -> Row:
    """All adapters in one batch, against the same batch without any."""
    loaded = one.call("load_adapters", count=ADAPTERS)["names"]
    named = [loaded[number % ADAPTERS] for number in range(SEQUENCES)]
    prompts = texts.windows(SEQUENCES, PROMPT)
    one.decode(prompts, STEPS, adapter_names=named)
    found = in_turn(
        rounds, [lambda _: one.decode(prompts, STEPS, adapter_names=named), lambda _: one.decode(prompts, STEPS)]
    )
    return at_least(name, "tokens/s", found[0], found[1], ADAPTERS_AIM)

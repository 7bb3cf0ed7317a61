"""Constrained output: are answers valid, what does it cost, and what do hostile constraints do to others?

    python -m bench.constrained --precision int8 --json

Random schemas of rising depth, each bounded, answered by the default model with a token limit that suffices for the
longest answer that the schema allows; then hostile constraints while another request decodes. `--quick`: 30 schemas.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import jsonschema
from tokenizers import Tokenizer

from bench import command, hostile
from bench.peers.places import SMOLLM2
from bench.rows import Row, bounded, reported
from bench.schemas import Schema, most_bytes, schemas, without_bounds
from bench.sides.start import THREADS, folder
from llmos.clock import SystemClock
from llmos.store.precision import Precision
from worker.backend import Attempt, Constraint, Epoch, FinishReason, ModelSpec, Output, Sampling
from worker.backends.torch import TorchBackend
from worker.config import WorkerConfig
from worker.engine.grammar.guard import Guard
from worker.engine.grammar.matcher import Matcher
from worker.engine.grammar.vocabulary import Vocabulary

SCHEMAS, QUICK = 300, 30
SEED, DEEPEST = 2024, 5
TOGETHER = 16
MEMORY_BYTES = 2 << 30
RESUMED = 30
VERDICT_S = 2.0
VICTIM_TOKENS = 4000
FOLLOWED = 16
"""Tokens of a hostile constraint that passed, before its request is cancelled."""
Answers = dict[str, list[int]]


@dataclass(slots=True)
class Bench:
    """The default model behind a backend of its own."""

    backend: TorchBackend
    tokenizer: Tokenizer
    end: int

    def attempt(self, name: str, text: str, constraint: Constraint | None, max_tokens: int) -> Attempt:
        """Every second one greedy, the others sampled."""
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        number = int(re.sub(r"\D", "", name) or 0)
        return Attempt(
            request_id=name,
            epoch=Epoch(1, 1),
            model="m",
            prompt=self.tokenizer.encode(prompt, add_special_tokens=False).ids,
            max_tokens=max_tokens,
            sampling=Sampling(temperature=float(number % 2), seed=number),
            constraint=constraint,
        )

    def run(self, attempts: Iterable[Attempt]) -> tuple[Answers, dict[str, FinishReason]]:
        """Tokens and the reason of the end, by request."""
        for attempt in attempts:
            self.backend.admit(attempt)
        tokens: Answers = {}
        finishes: dict[str, FinishReason] = {}
        while self.backend.busy():
            for output in self.backend.step().outputs:
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish is not None:
                    finishes[output.request_id] = output.finish
        return tokens, finishes

    def text(self, tokens: Sequence[int]) -> str:
        """Without the end token."""
        kept = tokens[:-1] if tokens and tokens[-1] == self.end else tokens
        return cast(str, self.tokenizer.decode(list(kept), skip_special_tokens=False))


def asked(bench: Bench, wanted: Sequence[Schema]) -> list[Attempt]:
    """One request per schema."""
    found = []
    for number, schema in enumerate(wanted):
        text = json.dumps(without_bounds(schema))
        constraint = Constraint("json_schema", text)
        prompt = f"Make up an example of this JSON schema: {text[:1000]}"
        found.append(bench.attempt(f"schema {number}", prompt, constraint, most_bytes(schema) + 1))
    return found


def is_valid(text: str, schema: Schema) -> bool:
    """Whether an answer is JSON that the schema allows."""
    try:
        jsonschema.validate(
            json.loads(text), without_bounds(schema), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def validity(bench: Bench, wanted: Sequence[Schema], answers: Answers, ends: dict[str, FinishReason]) -> Iterator[Row]:
    """Valid and stopped, by depth."""
    good = [
        ends.get(f"schema {n}") is FinishReason.STOP and is_valid(bench.text(answers[f"schema {n}"]), schema)
        for n, schema in enumerate(wanted)
    ]
    per_depth = len(wanted) // (DEEPEST + 1)
    for depth in range(DEEPEST + 1):
        part = good[depth * per_depth : (depth + 1) * per_depth]
        yield Row(
            f"depth {depth}: valid and stopped", sum(part), len(part), "answers", sum(part) / len(part), 1.0, all(part)
        )
    yield Row("all: valid and stopped", sum(good), len(good), "answers", sum(good) / len(good), 1.0, all(good))


def resumed(bench: Bench, attempts: Sequence[Attempt], answers: Answers) -> Row:
    """Some answers again, alone, from a random index."""
    source = random.Random(SEED)
    same = 0
    chosen = source.sample(list(attempts), min(RESUMED, len(attempts)))
    for attempt in chosen:
        whole = answers[attempt.request_id]
        index = source.randrange(len(whole))
        tokens, _ = bench.run([replace(attempt, resume={0: whole[:index]})])
        same += tokens[attempt.request_id] == whole[index:]
    return Row("resumed alone: same tokens", same, len(chosen), "answers", same / len(chosen), 1.0, same == len(chosen))


def costs(vocabulary: Vocabulary, attempts: Sequence[Attempt], answers: Answers) -> Iterator[Row]:
    """Of compiling, and of a token's mask, without the model."""
    compiling, masks = [], []
    for attempt in attempts:
        assert attempt.constraint is not None
        start = time.perf_counter()
        compiled = vocabulary.compile(attempt.constraint)
        compiling.append(time.perf_counter() - start)
        matcher = Matcher(compiled, vocabulary)
        matcher.advance(())
        for token in answers[attempt.request_id]:
            start = time.perf_counter()
            matcher.allowed()
            matcher.advance((token,))
            masks.append(time.perf_counter() - start)
    for name, times, scale, unit in (("compile", compiling, 1e3, "ms"), ("mask of a row", masks, 1e6, "us")):
        times.sort()
        for label, share in (("median", 0.5), ("99 %", 0.99), ("slowest", 1.0)):
            yield reported(f"{name}, {label}", unit, times[min(len(times) - 1, int(share * len(times)))] * scale)


def speed(bench: Bench, attempts: Sequence[Attempt], answers: Answers) -> Row:
    """Tokens per second of a batch with its constraints, beside the same prompts and lengths without."""
    batch = sorted(attempts, key=lambda attempt: -len(answers[attempt.request_id]))[:TOGETHER]
    free = [
        replace(attempt, constraint=None, ignore_eos=True, max_tokens=len(answers[attempt.request_id]))
        for attempt in batch
    ]
    rates = []
    for requests in (batch, free):
        start = time.perf_counter()
        tokens, _ = bench.run(requests)
        rates.append(sum(map(len, tokens.values())) / (time.perf_counter() - start))
    return reported(f"{TOGETHER} together, with and without constraints", "tokens/s", *rates)


class Victim:
    """A request that decodes while hostile ones come and go."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._again = 0
        self.missed = 0
        """Steps that brought it no token."""
        self.steps: list[float] = []

    def admit(self) -> None:
        """Begin, until it decodes."""
        self._again += 1
        free = self._bench.attempt(f"victim {self._again}", "Tell me a story.", None, VICTIM_TOKENS)
        self._bench.backend.admit(replace(free, ignore_eos=True))
        while not any(self._mine(output) for output in self._bench.backend.step().outputs):
            pass

    def end(self) -> None:
        """Stop decoding."""
        self._bench.backend.cancel(f"victim {self._again}")

    def step(self) -> tuple[list[Output], list[str]]:
        """One step; the others' outputs and failures."""
        start = time.perf_counter()
        result = self._bench.backend.step()
        self.steps.append(time.perf_counter() - start)
        own = [output for output in result.outputs if self._mine(output)]
        self.missed += not own
        if any(output.finish for output in own):
            self.admit()
        return [output for output in result.outputs if output not in own], [one.request_id for one in result.failures]

    def _mine(self, output: Output) -> bool:
        return output.request_id == f"victim {self._again}"


def hostility(bench: Bench, only: str) -> Iterator[Row]:
    """Verdicts, and what the other stream noticed."""
    victim, verdicts = Victim(bench), dict[str, float]()
    victim.admit()
    for _ in range(50):
        victim.step()
    calm, victim.steps = victim.steps, []
    for name, constraint in hostile.constraints().items():
        if only in name:
            verdicts[name] = _face(bench, victim, name, constraint)
    victim.end()
    yield bounded(
        f"slowest verdict of {len(verdicts)}: {max(verdicts, key=verdicts.__getitem__)}",
        "s",
        max(verdicts.values()),
        VERDICT_S,
    )
    yield Row("steps without a token for another stream", victim.missed, 0, "steps", None, 0.0, victim.missed == 0)
    yield reported("slowest step, hostile and calm", "ms", max(victim.steps) * 1e3, max(calm) * 1e3)
    yield reported(
        "median step, hostile and calm", "ms", statistics.median(victim.steps) * 1e3, statistics.median(calm) * 1e3
    )


def _face(bench: Bench, victim: Victim, name: str, constraint: Constraint) -> float:
    """Seconds until a constraint was refused or its first token came."""
    bench.backend.admit(bench.attempt(name, "Go.", constraint, FOLLOWED))
    start, verdict = time.perf_counter(), None
    while True:
        outputs, failures = victim.step()
        if verdict is None and (outputs or failures):
            verdict = time.perf_counter() - start
        if name in failures or any(output.finish for output in outputs):
            return cast(float, verdict)


def measure(quick: bool, only: str, precision: Precision) -> Iterator[Row]:
    """All rows."""
    files = folder(SMOLLM2)
    guard = Guard(SystemClock())
    bench = _bench(files, precision, guard)
    wanted = schemas(QUICK if quick else SCHEMAS, SEED, DEEPEST)
    attempts = asked(bench, wanted)
    answers: Answers = {}
    ends: dict[str, FinishReason] = {}
    for first in range(0, len(attempts), TOGETHER):
        tokens, reasons = bench.run(attempts[first : first + TOGETHER])
        answers |= tokens
        ends |= reasons
    yield from validity(bench, wanted, answers, ends)
    yield resumed(bench, attempts, answers)
    yield from costs(Vocabulary(files, 49_152, {bench.end}), attempts, answers)
    yield speed(bench, attempts, answers)
    yield from hostility(bench, only)
    guard.close()


def _bench(files: Path, precision: Precision, guard: Guard) -> Bench:
    backend = TorchBackend(threads=THREADS, precision=precision, guard=guard)
    backend.load(ModelSpec("m", "1", files), MEMORY_BYTES)
    tokenizer = Tokenizer.from_file(str(files / "tokenizer.json"))
    return Bench(backend, tokenizer, tokenizer.token_to_id("<|im_end|>"))


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("constrained", __doc__, f"{QUICK} schemas")
    parser.add_argument("--precision", default=WorkerConfig().precision, help="by default the worker's")
    options = parser.parse_args()
    return command.run("constrained", options, lambda versions: measure(options.quick, options.only, options.precision))


if __name__ == "__main__":
    sys.exit(main())

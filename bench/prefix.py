"""The prefix cache: what of a prompt is computed again, and how much sooner the first token comes.

    python -m bench.prefix

Prompts of 1,024 tokens that were asked before, and a new suffix: how many tokens are computed, whether the answer is
the one without a cache, how long the first token takes compared with the first time, and how much of the same prompt
another tenant finds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import command
from bench.rows import Row, at_most
from bench.subject import Prompts, default_model, plan_of, prompts_of
from gateway.text.prefix import prefix_hashes
from worker.backend import Attempt, Epoch, ModelSpec, Sampling, Stage
from worker.backends.torch import TorchBackend

MODEL = "model"
SHARED, SUFFIX, ANSWER = 1024, 32, 16
TTFT_SHARE = 0.1
_MEMORY = 1 << 30


@dataclass(slots=True)
class Asked:
    """What became of a request."""

    tokens: list[int]
    first_s: float
    computed: int
    cached: int


def ask(backend: TorchBackend, name: str, prompt: Sequence[int], tenant: str | None) -> Asked:
    """Run a request to its end, alone. No tenant: without hashes."""
    attempt = Attempt(name, Epoch(1, 1), MODEL, prompt, ANSWER, sampling=Sampling(temperature=0.8, seed=7))
    if tenant is not None:
        attempt = replace(attempt, prefix_hashes=prefix_hashes(prompt, model_version="1", tenant=tenant))
    asked = Asked([], 0.0, 0, 0)
    begun = time.perf_counter()
    backend.admit(attempt)
    while backend.busy():
        result = backend.step()
        for output in result.outputs:
            asked.first_s = asked.first_s or time.perf_counter() - begun
            asked.tokens.extend(output.token_ids)
            asked.cached += output.cached_tokens
        asked.computed += sum(done.tokens for done in result.stages if done.stage is Stage.PREFILL)
    return asked


def measure(backend: TorchBackend, text: Prompts, rounds: int) -> Iterator[Row]:
    """Every round another prompt."""
    first, second, other, plain = [], [], [], []
    for number in range(rounds):
        shared, tail = text(number, SHARED), text(number + rounds, SUFFIX)
        first.append(ask(backend, f"first {number}", shared + text(number + 2 * rounds, SUFFIX), "one"))
        second.append(ask(backend, f"second {number}", shared + tail, "one"))
        other.append(ask(backend, f"other {number}", shared + tail, "another"))
        plain.append(ask(backend, f"plain {number}", shared + tail, None))
    yield _exactly(
        "tokens computed after a cached prefix, at most", "tokens", max(one.computed for one in second), SUFFIX
    )
    same = sum(mine.tokens == theirs.tokens for mine, theirs in zip(second, plain, strict=True))
    yield _exactly("answers that are the same as without a cache", "answers", same, rounds)
    yield _exactly("tokens that another tenant finds", "tokens", sum(one.cached for one in other), 0)
    yield at_most(
        "time to first token, cached to not cached",
        "s",
        [one.first_s for one in second],
        [one.first_s for one in first],
        TTFT_SHARE,
    )


def _exactly(case: str, unit: str, value: int, wanted: int) -> Row:
    return Row(case, value, wanted, unit, None, float(wanted), value == wanted)


def _run(folder: Path, rounds: int) -> Iterator[Row]:
    backend = TorchBackend(threads=torch.get_num_threads())
    backend.load(ModelSpec(MODEL, "1", folder, plan=plan_of(folder)), _MEMORY)
    yield from measure(backend, prompts_of(folder), rounds)


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("prefix", __doc__, "two rounds")
    parser.add_argument("--model", type=Path, help="folder of a model in the store; by default the default model")
    options = parser.parse_args()
    return command.run("prefix", options, lambda _: _run(options.model or default_model(), 2 if options.quick else 5))


if __name__ == "__main__":
    sys.exit(main())

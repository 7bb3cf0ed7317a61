"""The torch backend: any decoder that transformers loads, continuously batched, byte-exact on the CPU; and encoders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from llmos.clock import Clock, SystemClock
from llmos.errors import SourceError, Unavailable, UnsupportedFeature
from llmos.store.precision import Precision
from worker import kernels
from worker.backend import Attempt, Blocks, CacheChange, Failure, Footprint, ModelSpec, Output, StageDone, StepResult
from worker.engine import footprint
from worker.engine.device import select_device
from worker.engine.encoder import load_encoder
from worker.engine.engine import Engine, EngineOptions, kv_blocks
from worker.engine.grammar.grammars import Grammars, open_grammars
from worker.engine.grammar.guard import Guard
from worker.engine.loading import load
from worker.engine.lora import read_adapter
from worker.engine.paged import Servable
from worker.engine.text_engine import TextEngine, encoder_fits
from worker.kernels.library import preferred

log = logging.getLogger(__name__)

_NO_BLOCKS = Blocks(0, 0)


class TorchBackend:
    """Implements `worker.backend.Backend`: an `Engine` or `TextEngine` per loaded model, stepped in turn.

    `threads` are torch's, for the whole process; `device` is `auto`, `cpu` or `cuda`. `precision` is what is wanted:
    on the CPU `auto` needs the kernels, which may be compiled now, and otherwise is fp32; the log says so. Without
    kernels torch computes fp16 and int8. On CUDA `auto` is bf16. `guard` tries constraints; without one, output cannot
    be constrained.
    """

    def __init__(
        self,
        *,
        threads: int,
        device: str = "cpu",
        clock: Clock | None = None,
        precision: Precision = "auto",
        kernels_available: Callable[[], bool] | None = None,
        options: EngineOptions | None = None,
        guard: Guard | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self.device = select_device(device)
        """Where all its models are."""
        self.precision, self.kernels = _possible(
            precision, self.device, kernels_available or (preferred if precision == "auto" else kernels.available)
        )
        """What it serves in, and whether the kernels compute what they can."""
        self._clock = clock or SystemClock()
        self._options = options
        self._guard = guard
        self._engines: dict[str, Engine | TextEngine] = {}
        self._footprints: dict[str, Footprint] = {}
        self._adapters: dict[str, str] = {}
        """Loaded adapters and their base."""

    def load(self, spec: ModelSpec, memory_budget: int) -> Blocks:
        """See `Backend`. Raises SourceError, UnsupportedFeature, or Unavailable if not one block fits."""
        if spec.folder is None:
            raise SourceError(f"{spec.name} has no folder to load from.")
        self.unload(spec.name)
        if spec.base:
            return self._load_adapter(spec, spec.folder)
        footprint.warm(spec.folder)
        own = footprint.settled()
        engine = self._open(spec, spec.folder, memory_budget)
        self._engines[spec.name] = engine
        self._footprints[spec.name] = engine.footprint(footprint.settled() - own if own else 0)
        return engine.blocks()

    def _open(self, spec: ModelSpec, folder: Path, memory_budget: int) -> Engine | TextEngine:
        encoder = load_encoder(folder, self.device, spec.context_length)
        if encoder is not None:
            encoder_fits(encoder, memory_budget)
            return TextEngine(encoder, self._clock)
        decoder = load(
            folder,
            self.device,
            spec.context_length,
            precision=self.precision,
            plan=spec.plan,
            kernels=self.kernels,
        )
        return Engine(
            decoder,
            kv_blocks(decoder, memory_budget),
            self._clock,
            name=spec.name,
            options=self._options,
            grammars=self._open_grammars(folder, decoder),
        )

    def footprint(self, name: str) -> Footprint:
        """See `Backend`."""
        return self._footprints.get(name, Footprint())

    def unload(self, name: str) -> None:
        """See `Backend`."""
        engine = self._engines.pop(name, None)
        self._footprints.pop(name, None)
        if engine is not None:
            engine.close()
            del engine
            footprint.settled()
            if self.device.type == "cuda":
                # Recorded passes are garbage by now; another worker on the card may need what the allocator keeps.
                torch.cuda.empty_cache()
        base = self._adapters.pop(name, None)
        if base is not None and isinstance(holder := self._engines[base], Engine):
            holder.drop_adapter(name)
        self._adapters = {adapter: base for adapter, base in self._adapters.items() if base in self._engines}

    def _load_adapter(self, spec: ModelSpec, folder: Path) -> Blocks:
        engine = self._engines.get(spec.base)
        if isinstance(engine, TextEngine):
            raise UnsupportedFeature(f"{spec.base} writes no text: llmos runs adapters to models that do.")
        if engine is None:
            raise Unavailable(f"The model {spec.base}, to which {spec.name} belongs, is not loaded here.")
        engine.load_adapter(spec.name, read_adapter(folder))
        self._adapters[spec.name] = spec.base
        return _NO_BLOCKS

    def blocks(self) -> Mapping[str, Blocks]:
        """See `Backend`."""
        own = {name: engine.blocks() for name, engine in self._engines.items()}
        return own | dict.fromkeys(self._adapters, _NO_BLOCKS)

    def admit(self, attempt: Attempt) -> None:
        """See `Backend`. Raises Unavailable if the model is not loaded or has too few blocks, or `InvalidRequest`."""
        engine = self._engines.get(attempt.model)
        if engine is None:
            raise Unavailable(f"The model {attempt.model} is not loaded here.")
        epochs = [engine.epoch(attempt.request_id) for engine in self._engines.values()]
        if any(epoch is not None and epoch >= (attempt.epoch.term, attempt.epoch.attempt) for epoch in epochs):
            return
        self.cancel(attempt.request_id)
        engine.admit(attempt)

    def cancel(self, request_id: str, choice: int | None = None, keep_until: int | None = None) -> None:
        """See `Backend`."""
        for engine in self._engines.values():
            engine.cancel(request_id, choice, keep_until)

    def set_priority(self, request_id: str, priority: int) -> None:
        """See `Backend`."""
        for engine in self._engines.values():
            engine.set_priority(request_id, priority)

    def busy(self) -> bool:
        """See `Backend`."""
        return any(engine.busy() for engine in self._engines.values())

    def step(self) -> StepResult:
        """See `Backend`."""
        outputs: list[Output] = []
        failures: list[Failure] = []
        stages: list[StageDone] = []
        cache: list[CacheChange] = []
        # Who only waits for a verdict must not hold up the others' steps.
        patient = not any(engine.computing for engine in self._engines.values())
        for engine in self._engines.values():
            if engine.busy():
                result = engine.step(patient=patient)
                outputs.extend(result.outputs)
                failures.extend(result.failures)
                stages.extend(result.stages)
                cache.extend(result.cache)
        return StepResult(outputs, failures, stages, cache)

    def _open_grammars(self, folder: Path, decoder: Servable) -> Grammars | None:
        if self._guard is None:
            return None
        return open_grammars(self._guard, folder, decoder.vocabulary, decoder.end_tokens, self._clock)


def _possible(wanted: Precision, device: torch.device, available: Callable[[], bool]) -> tuple[Precision, bool]:
    """What can be served in, and whether by the kernels."""
    if wanted == "fp32":
        return wanted, False
    if device.type != "cpu":
        if wanted == "int8":
            log.warning("int8 is for the CPU; serving in bf16 on %s", device)
            return "auto", False
        return wanted, False
    log.info("preparing the kernels; at their first use they are compiled, which takes about half a minute")
    if available():
        return wanted, True
    if wanted == "auto":
        log.warning("the kernels cannot be used here; serving in fp32")
        return "fp32", False
    return wanted, False

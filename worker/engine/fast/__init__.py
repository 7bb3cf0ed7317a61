"""The fast path: Llama-shaped models through the engine's own kernels, int8 weights, fp16 keys and values."""

from worker.engine.fast.decoder import FastDecoder, fast_decoder
from worker.engine.fast.pool import FastKVPool
from worker.engine.fast.rows import FastRows
from worker.engine.fast.support import why_not

__all__ = ["FastDecoder", "FastKVPool", "FastRows", "fast_decoder", "why_not"]

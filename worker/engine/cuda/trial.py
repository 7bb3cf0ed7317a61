"""`python -m worker.engine.cuda.trial`: which graphics processors models can be computed on here.

Prints a JSON list of their UUIDs, in torch's order. Each has stored and attended a row in bf16, which takes a driver
that fits torch, Triton, a C compiler or what it has compiled before, and a processor that knows the type.
"""

from __future__ import annotations

import json
import sys

import torch

from worker.engine.attention import LayerCall
from worker.engine.cuda.kernels import attend, store
from worker.engine.kv import BLOCK_TOKENS, LayerShape

_DIM = 64


def computes(device: torch.device) -> bool:
    """Whether one row that sees itself alone gets its own value."""
    rows = torch.arange(_DIM, device=device, dtype=torch.bfloat16).view(1, 1, _DIM)
    places = torch.zeros(BLOCK_TOKENS, 1, _DIM, device=device, dtype=torch.bfloat16)
    zeros = torch.zeros(1, dtype=torch.int64, device=device)
    store(rows, places, zeros)
    call = LayerCall(1, LayerShape(1, _DIM, _DIM), 1.0, None, None)
    out = attend(call, rows, places, places, zeros.int(), zeros, zeros + 1)
    return torch.equal(out, rows)


def main() -> int:
    """Entry point of the command. What went wrong with a device goes to standard error."""
    found = []
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        try:
            with torch.cuda.device(device):
                if computes(device):
                    found.append(str(getattr(torch.cuda.get_device_properties(device), "uuid", "")))
        except Exception as error:  # whatever a driver, a compiler or torch raises
            sys.stderr.write(f"{torch.cuda.get_device_name(device)}: {type(error).__name__}: {error}\n")
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

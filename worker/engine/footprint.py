"""What a model really takes: memory of this process before and after it was loaded. Linux; elsewhere nothing is known.

Counted are pages of the process's own (`RssAnon`, those swapped out too) and the tensors that stay in the model's
mapped files: such pages are shared with the page cache, but a step reads them all, so that they must be resident.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import transformers
from torch import Tensor, nn

_STATUS, _MAPS = Path("/proc/self/status"), Path("/proc/self/maps")
_OWN = re.compile(r"^(?:RssAnon|VmSwap):\s+(\d+) kB$", re.MULTILINE)


def give_back() -> None:
    """Return what nobody refers to any more to the operating system: cycles, then the C library's free lists."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def own_bytes() -> int:
    """Bytes of the process's own pages; 0 where the system does not say."""
    try:
        return 1024 * sum(map(int, _OWN.findall(_STATUS.read_text())))
    except OSError:
        return 0


def mapped_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors that lie in mapped files, each stretch of memory counted once."""
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return 0
    files = [
        tuple(int(end, 16) for end in line.split(" ", 1)[0].split("-")) for line in lines if ".safetensors" in line
    ]
    places = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.device.type == "cpu"}
    return sum(size for place, size in places.items() if any(low <= place < high for low, high in files))


def warm(folder: Path) -> None:
    """Import the code of a model's class, which stays whatever is unloaded: it is no part of what the model takes."""
    with contextlib.suppress(OSError, ValueError, AttributeError, ImportError):  # loading says what is wrong with it
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for name in config.architectures or ():
            getattr(transformers, name)


def settled() -> int:
    """Bytes of the process's own pages after everything unused was given back."""
    give_back()
    return own_bytes()


def fixed_bytes(module: nn.Module | None, weight_bytes: int, grown: int) -> int:
    """What weights take: `grown` of the process's own, and what a torch module reads from files that stay mapped.

    `weight_bytes`, its tensors' own account, where nothing was measured or the weights are not in main memory.
    """
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    if grown <= 0 or any(tensor.device.type != "cpu" for tensor in tensors):
        return weight_bytes
    return grown + mapped_bytes(tensors)

"""Loads the compiled kernels. Without torch: whoever only asks whether they can be used need not import it."""

from __future__ import annotations

import ctypes
import functools

from worker.kernels import abi
from worker.kernels.build import BuildError, library_path

_PORTABLE = 0


@functools.cache
def open_library() -> ctypes.CDLL | str:
    """The library, compiled now if there is none yet, or why there is none. Opened once per process."""
    try:
        library = ctypes.CDLL(str(library_path()))
        abi.declare(library)
        if library.llk_abi() != abi.ABI:
            raise BuildError(f"the library speaks interface {library.llk_abi()}, not {abi.ABI}")
    except (BuildError, OSError, AttributeError) as error:
        return str(error)
    return library


def preferred() -> bool:
    """Whether the kernels serve where nobody asks for them: they load, and know this processor's vector unit."""
    library = open_library()
    return not isinstance(library, str) and library.llk_best_isa() != _PORTABLE

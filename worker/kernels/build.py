"""Compiles the kernels: one shared library for all instruction sets of this machine's architecture.

A library is named after its sources and flags, so that a changed source is a new library. The package's build
(`setup.py`) puts one beside this file; a checkout, and a wheel that was built without a compiler, compile at first use
into the user's cache, or before it by `python -m worker.kernels.build`, which needs nothing that is not in Python.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
_COMPILERS = ("c++", "g++", "clang++")
# No contraction: a product and a sum are fused where the source says so, on every processor.
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_PLAIN = ("api", "model", "team")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_X86 = {"avx2": _AVX2, "avx512_vnni": _AVX512}
_COMPILE_TIMEOUT_S = 300.0
_LOCK_POLL_S = 0.1


class BuildError(Exception):
    """The kernels cannot be compiled here; the text says why."""


def library_path(cache: Path | None = None, compiler: str | None = None) -> Path:
    """The compiled library, compiled now if there is none yet (about 30 s of CPU). Raises BuildError."""
    cache = cache or default_cache()
    if found := find_library(cache):
        return found
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _lock(cache / "lock"):
            if not (cache / library_name()).is_file():
                compile_into(cache, compiler)
    except OSError as error:
        raise BuildError(f"the kernels' cache folder cannot be written: {error.strerror}") from error
    return cache / library_name()


def find_library(cache: Path | None = None) -> Path | None:
    """The compiled library, if there is one."""
    candidates = (folder / library_name() for folder in (SOURCES, cache or default_cache()))
    return next((path for path in candidates if path.is_file()), None)


def default_cache(environ: Mapping[str, str] | None = None) -> Path:
    """`llmos/kernels` in the user's cache folder (`XDG_CACHE_HOME`, by default ~/.cache)."""
    if environ is None:
        # Imported here because the package's build runs this file before anything else is installed.
        from llmos.config import environment

        environ = environment()
    cache = Path(environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path("~/.cache").expanduser()) / "llmos" / "kernels"


@functools.cache
def library_name() -> str:
    """File name of the library that the present sources make on this machine's architecture."""
    digest = hashlib.sha256(repr((platform.system(), platform.machine(), _FLAGS, _X86)).encode())
    for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"libllmos_kernels-{digest.hexdigest()[:20]}.so"


def find_compiler() -> str | None:
    """A C++ compiler on the path, if there is one."""
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def compile_into(folder: Path, compiler: str | None = None, extra: Sequence[str] = ()) -> Path:
    """Compile into `folder`; the library appears there at once and whole. `extra` flags, which do not count for its
    name, come last. Raises BuildError.
    """
    chosen = compiler or find_compiler()
    if chosen is None:
        raise BuildError("no C++ compiler was found (c++, g++ or clang++)")
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        objects = _compile_objects(chosen, Path(scratch), extra)
        library = Path(scratch) / "library.so"
        _finish([_start(chosen, ["-shared", "-pthread", *map(str, objects), "-o", str(library)])])
        target = folder / library_name()
        library.replace(target)
    return target


def _compile_objects(compiler: str, scratch: Path, extra: Sequence[str]) -> list[Path]:
    jobs: dict[str, list[str]] = {name: [str(SOURCES / f"{name}.cpp")] for name in _PLAIN}
    sets: dict[str, tuple[str, ...]] = {"portable": ()}
    if platform.machine().lower() in ("x86_64", "amd64"):
        sets.update(_X86)
    for name, flags in sets.items():
        jobs[name] = [*flags, f"-DLLK_TABLE=llk_kernels_{name}", str(SOURCES / "step.cpp")]
    objects = [scratch / f"{name}.o" for name in jobs]
    _finish(
        [
            _start(compiler, [*_FLAGS, *extra, "-w", "-c", *arguments, "-o", str(target)])
            for arguments, target in zip(jobs.values(), objects, strict=True)
        ]
    )
    return objects


def _start(compiler: str, arguments: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            [compiler, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except OSError as error:
        raise BuildError(f"the compiler {compiler} does not start: {error.strerror}") from error


def _finish(processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + _COMPILE_TIMEOUT_S
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
            if process.returncode:
                first = next(iter(output.splitlines()), "no message")
                raise BuildError(f"the compiler failed: {first}")
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the compiler took longer than {_COMPILE_TIMEOUT_S:.0f} s") from error
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            # Leaving the context closes its pipe and waits for it.
            with process:
                pass


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process compiles; the others wait for it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _COMPILE_TIMEOUT_S
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                raise BuildError("another process has been compiling the kernels for too long")
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    try:
        library_path(default_cache(os.environ))
    except BuildError as problem:
        sys.exit(f"The kernels were not compiled: {problem}. torch serves instead.")

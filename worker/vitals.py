"""What a worker's own processes use of what can run out: memory, of graphics processors too, descriptors, threads.

Memory is RssAnon + VmSwap of `proc(5)`: what only these processes hold. Pages of files that are mapped, such as weights
and libraries, can be dropped at any time and would hide a leak behind the page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llmos.v1 import fleet_pb2
from worker import gpu_use
from worker.gpu_use import GpuUse

MOST_THREADS = 4096
"""Beyond that something is wrong, whatever the system allows."""
_KIB = 1024


class Vitals:
    """Looks at the processes that `pids` lists. One look takes about a tenth of a millisecond."""

    def __init__(
        self,
        memory_bytes: int,
        pids: Callable[[], Iterable[int | None]],
        *,
        proc: Path = Path("/proc"),
        files: int = 0,
        gpus: Callable[[], Sequence[GpuUse]] = tuple,
    ) -> None:
        """`memory_bytes` may be used; so may `files` descriptors a process, by default what the system allows. `gpus`
        says what was seen last of graphics processors."""
        self._memory_bytes = memory_bytes
        self._pids = pids
        self._proc = proc
        self._files = files or _file_limit()
        self._gpus = gpus

    def measure(self) -> list[fleet_pb2.ResourceUse]:
        """As of now. A process that is gone counts nothing; where there is no /proc, nothing can be said."""
        memory = threads = files = 0
        pids = list(self._pids())
        for pid in pids:
            status = {} if pid is None else self._status(pid)
            memory += _KIB * (status.get("RssAnon", 0) + status.get("VmSwap", 0))
            threads += status.get("Threads", 0)
            files = max(files, 0 if pid is None else self._open_files(pid))
        if not threads:
            return []
        return [
            _use(fleet_pb2.RESOURCE_KIND_MEMORY, memory, self._memory_bytes),
            _use(fleet_pb2.RESOURCE_KIND_FILES, files, self._files),
            _use(fleet_pb2.RESOURCE_KIND_THREADS, threads, MOST_THREADS),
            *gpu_use.held(self._gpus(), pids, lambda pid: (self._proc / str(pid)).exists()),
        ]

    def _status(self, pid: int) -> dict[str, int]:
        """Number of each line that begins with one."""
        try:
            text = (self._proc / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return {}
        found = {}
        for line in text.splitlines():
            name, _, rest = line.partition(":")
            first = rest.split(maxsplit=1)[:1]
            if first and first[0].isdecimal():
                found[name] = int(first[0])
        return found

    def _open_files(self, pid: int) -> int:
        try:
            return sum(1 for _ in (self._proc / str(pid) / "fd").iterdir())
        except OSError:
            return 0


def _use(kind: fleet_pb2.ResourceKind.ValueType, used: int, limit: int) -> fleet_pb2.ResourceUse:
    return fleet_pb2.ResourceUse(kind=kind, used=used, limit=limit)


def _file_limit() -> int:
    try:
        import resource
    except ImportError:  # not on Windows, where there is no /proc either
        return 0
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

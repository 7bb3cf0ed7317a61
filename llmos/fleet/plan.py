"""Command lines of the fleet's services. Values in, values out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

from llmos.fleet.options import HOST, FleetOptions, Share

DRAIN_S = 600.0
"""How long gateways and workers may drain; the supervisor tells them to hurry when somebody waits at the keyboard."""


class Plan(Protocol):
    """What to run for each role. Tests plan scripts in place of the services."""

    def scheduler(self, name: str, etcd: Sequence[str], port: int) -> list[str]:
        """Program and arguments of a scheduler; port 0 means any."""
        ...

    def worker(self, name: str, etcd: Sequence[str]) -> list[str]:
        """Program and arguments of a worker."""
        ...

    def gateway(self, name: str, schedulers: Sequence[str], http_fd: int, grpc_port: int) -> list[str]:
        """Program and arguments of a gateway that serves HTTP on an inherited socket; port 0 means any."""
        ...


class ServicePlan:
    """`python -m scheduler | worker | gateway`, with this interpreter."""

    def __init__(self, options: FleetOptions, share: Share) -> None:
        self._options = options
        self._share = share

    def scheduler(self, name: str, etcd: Sequence[str], port: int) -> list[str]:
        return [*self._service("scheduler", name), "--port", str(port), "--etcd-endpoints", ",".join(etcd)]

    def worker(self, name: str, etcd: Sequence[str]) -> list[str]:
        options, share = self._options, self._share
        command = [*self._service("worker", name), "--port", "0", "--etcd-endpoints", ",".join(etcd)]
        command += ["--backend", options.backend, "--precision", options.precision, "--model", options.model]
        command += ["--device", options.device, "--place", f"{name.rpartition('-')[2]}/{options.workers}"]
        command += [
            "--drain-s",
            f"{DRAIN_S:g}",
            "--threads",
            str(share.threads),
            "--memory-limit",
            str(share.memory_bytes),
        ]
        if options.store is not None:
            command += ["--store", str(options.store)]
        if options.echo_tokens_per_second is not None:
            command += ["--echo-tokens-per-second", f"{options.echo_tokens_per_second:g}"]
        return command

    def gateway(self, name: str, schedulers: Sequence[str], http_fd: int, grpc_port: int) -> list[str]:
        command = [*self._service("gateway", name), "--schedulers", ",".join(schedulers)]
        command += ["--http-fd", str(http_fd), "--grpc-port", str(grpc_port), "--share-grpc-port", "true"]
        command += ["--drain-s", f"{DRAIN_S:g}"]
        command += ["--stream-key-file", str(self._options.stream_key_file)]
        if self._options.keys_file is not None:
            command += ["--keys-file", str(self._options.keys_file)]
        return command

    def _service(self, module: str, name: str) -> list[str]:
        # -P: a folder called `worker` in the user's working directory must not take the service's place.
        ready = self._options.ready_dir / f"{name}.json"
        return [sys.executable, "-P", "-m", module, "--host", HOST, "--ready-file", str(ready)]

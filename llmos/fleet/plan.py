"""Command lines of the fleet's services. Values in, values out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

from llmos.fleet.options import HOST, FleetOptions, Share

GATEWAY_DRAIN_S = 5.0
"""How long running requests get after SIGTERM; shorter than in a cluster, because somebody waits at the keyboard."""
WORKER_DRAIN_S = 1.0
"""Workers stop after the gateways, when nobody listens any more."""


class Plan(Protocol):
    """What to run for each role. Tests plan scripts in place of the services."""

    def scheduler(self, name: str, etcd: Sequence[str]) -> list[str]:
        """Program and arguments of a scheduler."""
        ...

    def worker(self, name: str, etcd: Sequence[str]) -> list[str]:
        """Program and arguments of a worker."""
        ...

    def gateway(self, name: str, schedulers: Sequence[str], http_port: int, grpc_port: int) -> list[str]:
        """Program and arguments of a gateway; port 0 means any."""
        ...


class ServicePlan:
    """`python -m scheduler | worker | gateway`, with this interpreter."""

    def __init__(self, options: FleetOptions, share: Share) -> None:
        self._options = options
        self._share = share

    def scheduler(self, name: str, etcd: Sequence[str]) -> list[str]:
        return [*self._service("scheduler", name), "--port", "0", "--etcd-endpoints", ",".join(etcd)]

    def worker(self, name: str, etcd: Sequence[str]) -> list[str]:
        options, share = self._options, self._share
        command = [*self._service("worker", name), "--port", "0", "--etcd-endpoints", ",".join(etcd)]
        command += ["--backend", options.backend, "--precision", options.precision, "--model", options.model]
        command += [
            "--drain-s",
            f"{WORKER_DRAIN_S:g}",
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

    def gateway(self, name: str, schedulers: Sequence[str], http_port: int, grpc_port: int) -> list[str]:
        command = [*self._service("gateway", name), "--schedulers", ",".join(schedulers)]
        command += ["--http-port", str(http_port), "--grpc-port", str(grpc_port), "--drain-s", f"{GATEWAY_DRAIN_S:g}"]
        if self._options.keys_file is not None:
            command += ["--keys-file", str(self._options.keys_file)]
        return command

    def _service(self, module: str, name: str) -> list[str]:
        # -P: a folder called `worker` in the user's working directory must not take the service's place.
        ready = self._options.ready_dir / f"{name}.json"
        return [sys.executable, "-P", "-m", module, "--host", HOST, "--ready-file", str(ready)]

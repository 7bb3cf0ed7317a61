"""Ask a service whether it serves: `python -m llmos.healthcheck grpc://HOST:PORT | http://HOST:PORT/PATH`.

For container health checks. Exit status 0 means serving, 1 not. TLS comes from `LLMOS_HEALTHCHECK_TLS_*`.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llmos.config import TlsConfig, load
from llmos.fleet.probe import http_status
from llmos.rpc import open_channel

TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class HealthcheckConfig:
    """How to reach the service."""

    tls: TlsConfig = field(default_factory=TlsConfig)
    """Certificates for gRPC."""


async def grpc_serves(address: str, tls: TlsConfig) -> bool:
    """Whether the server at host:port reports SERVING within two seconds."""
    async with open_channel(address, tls) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S, wait_for_ready=True
            )
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main(argv: list[str]) -> int:
    """Check the one target in `argv`."""
    if len(argv) != 1 or not argv[0].startswith(("grpc://", "http://")):
        sys.stderr.write("usage: python -m llmos.healthcheck grpc://HOST:PORT | http://HOST:PORT/PATH\n")
        return 2
    target = argv[0]
    if target.startswith("http://"):
        return 0 if http_status(target, TIMEOUT_S) == 200 else 1
    config = load(HealthcheckConfig, "healthcheck")
    return 0 if asyncio.run(grpc_serves(target.removeprefix("grpc://"), config.tls)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

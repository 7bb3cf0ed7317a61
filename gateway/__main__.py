"""`python -m gateway`: the OpenAI-compatible HTTP API and the gRPC API in front of a fleet."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import socket
import sys
from functools import partial
from importlib import metadata

from gateway import request_id as request_ids
from gateway.authenticator import KeyAuthenticator
from gateway.catalogue import Catalogue
from gateway.config import GatewayConfig
from gateway.grpc_edge import UnreadableInterceptor
from gateway.grpc_fleet import FleetServicer
from gateway.grpc_service import InferenceServicer
from gateway.http.api import Api
from gateway.http.app import build_app
from gateway.http.server import HttpServer
from gateway.leader import LeaderClient
from gateway.link import Link, LinkConfig
from gateway.metrics import MeteredEngine, Metrics
from gateway.session import Sessions
from gateway.session_config import SessionConfig
from gateway.vault import Vault, read_keys
from llmos.addresses import host_port
from llmos.clock import Clock, SystemClock
from llmos.config import from_command_line
from llmos.keys import KeyRing
from llmos.lifetime import Stop, first_of, run_until_signal
from llmos.ready import write_ready
from llmos.rpc import RpcServer, open_channel
from llmos.telemetry import Telemetry
from llmos.v1 import fleet_pb2, fleet_pb2_grpc, inference_pb2_grpc

log = logging.getLogger(__name__)

_SUCCEED_S = 10.0
"""Longest wait for a leader and a model before a gateway that takes over another's sockets listens."""
_POLL_S = 0.02
_LAST_WRITES_S = 3.0
"""After the drain: time for the errors that ended the last streams to leave."""
_LAST_WORDS_S = 0.3
"""After the drain: time for cancellations and spans to reach the scheduler."""
_TELEMETRY_S = 1.0


class GatewayProcess:
    """A gateway's life: `serve` starts it, waits for the signal, drains and leaves."""

    def __init__(self, config: GatewayConfig, clock: Clock, rng: random.Random) -> None:
        """`rng` makes request ids and seeds, so it must be unguessable. Raises ConfigError on a bad keys file."""
        self._config = config
        self._clock = clock
        self._rng = rng
        self._id = config.id or f"gateway-{secrets.token_hex(4)}"
        self._telemetry = Telemetry(
            "gateway",
            self._id,
            clock=clock,
            otlp_endpoint=config.otlp_endpoint,
            sample_ratio=config.sample_ratio,
        )
        self._node = fleet_pb2.Node(
            id=self._id,
            role=fleet_pb2.NODE_ROLE_GATEWAY,
            pid=os.getpid(),
            host=socket.gethostname(),
            state=fleet_pb2.NODE_STATE_READY,
        )
        self._link = Link(
            LinkConfig(config.schedulers),
            self._node,
            connect=partial(open_channel, tls=config.tls),
            spans=self._telemetry.drain,
            clock=clock,
            rng=rng,
        )
        self._leader = LeaderClient(self._link.leader_channel)
        self._catalogue = Catalogue(self._leader.fetch_blob)
        self._sessions = Sessions(
            self._link,
            self._catalogue,
            SessionConfig(max_requests=config.max_requests, prefix_salt=config.prefix_salt),
            clock=clock,
            telemetry=self._telemetry,
            leader=self._leader,
            rng=rng,
            vault=Vault(read_keys(config.stream_key_file) if config.stream_key_file is not None else (), rng),
        )
        self._metrics = Metrics()
        self._metrics.watch("gateway_link", self._link.counters, gauges={"outbox"})
        self._metrics.watch("gateway_sessions", self._sessions.counters, gauges={"running"})
        self._authenticator = KeyAuthenticator(KeyRing(config.keys_file))

    async def serve(self, stop: Stop) -> None:
        """Run until `stop` is set; then let what runs end, within the configured time. Raises SetupError."""
        engine = MeteredEngine(self._sessions, self._metrics, self._clock)
        rpc, http = self._rpc_server(engine), self._http_server(engine)
        try:
            self._node.address = host_port(self._config.host, rpc.bind())
            tasks = [
                asyncio.create_task(self._link.run(self._sessions), name="link"),
                asyncio.create_task(self._catalogue.prefetch(), name="prefetch"),
            ]
            for task in tasks:
                # Neither ends by itself: a bug in one must end the process, visibly, and not leave it deaf.
                task.add_done_callback(lambda _: stop.set())
            if self._config.http_fd >= 0:
                await self._until_ready(stop)
            await rpc.start()
            await http.start()
            self._announce(http.port, rpc.port)
            await stop.wait()
            await self._drain(rpc, http, stop.hurry)
            await _end(tasks)
        finally:
            http.cut()
            await http.stop()
            await rpc.stop(0)
            await asyncio.to_thread(self._telemetry.shutdown, _TELEMETRY_S)

    async def _until_ready(self, stop: Stop) -> None:
        """A predecessor may still listen on the same ports: clients must not come here before they can be served."""
        deadline = self._clock.monotonic() + _SUCCEED_S
        while not (self._sessions.ready() or stop.is_set() or self._clock.monotonic() >= deadline):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)

    async def _drain(self, rpc: RpcServer, http: HttpServer, hurry: asyncio.Event) -> None:
        """Listen no more, let what runs end within the drain time, then end it with an error that can be resumed."""
        drain_s = self._config.drain_s
        log.info("draining for at most %.0f s", drain_s)
        self._sessions.retire()
        edges = asyncio.gather(http.stop(), rpc.stop(drain_s + _LAST_WRITES_S))
        done = asyncio.Event()
        waiting = asyncio.create_task(self._until_idle(http, done))
        await first_of(done, hurry, timeout_s=drain_s)
        waiting.cancel()
        self._sessions.close()
        await asyncio.wait({edges}, timeout=_LAST_WRITES_S)
        http.cut()
        await rpc.stop(0)
        await edges
        if self._link.connected:
            await asyncio.sleep(_LAST_WORDS_S)

    async def _until_idle(self, http: HttpServer, done: asyncio.Event) -> None:
        await http.stop()
        await self._sessions.idle()
        done.set()

    def _rpc_server(self, engine: MeteredEngine) -> RpcServer:
        config = self._config
        # Clients of the public API prove themselves by their keys, so they need no certificate.
        server = RpcServer(
            config.host,
            config.grpc_port,
            tls=config.tls,
            require_client_cert=False,
            share_port=config.share_grpc_port,
            interceptors=[UnreadableInterceptor()],
        )
        inference = InferenceServicer(engine, self._authenticator)
        fleet = FleetServicer(self._leader, self._authenticator)
        server.add(inference_pb2_grpc.add_InferenceServicer_to_server, inference, "llmos.v1.Inference")
        server.add(fleet_pb2_grpc.add_FleetServicer_to_server, fleet, "llmos.v1.Fleet")
        return server

    def _http_server(self, engine: MeteredEngine) -> HttpServer:
        config = self._config
        api = Api(
            engine=engine,
            authenticator=self._authenticator,
            metrics=self._metrics,
            limits=config.limits,
            version=metadata.version("llmos"),
            open_metrics=config.open_metrics,
        )
        new_id = partial(request_ids.generate, self._rng)
        return HttpServer(
            build_app(api, clock=self._clock, new_id=new_id),
            config.host,
            config.http_port,
            limits=config.limits,
            new_id=new_id,
            tls=config.tls,
            inherited=config.http_fd if config.http_fd >= 0 else None,
        )

    def _announce(self, http_port: int, grpc_port: int) -> None:
        """Say that it serves, in the log and, at once as a whole, in the ready file."""
        log.info("gateway %s serves HTTP on port %d, gRPC on port %d", self._id, http_port, grpc_port)
        write_ready(self._config.ready_file, self._id, port=http_port, http_port=http_port, grpc_port=grpc_port)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel what runs for the process's whole life; raise what one of them died of."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


def main() -> int:
    """Entry point of the process. Returns its exit status."""
    config = from_command_line(GatewayConfig, "gateway", "python -m gateway")
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # Its levels say nothing that the answers do not: lines per connection only bury what matters.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    clock = SystemClock()
    rng = random.SystemRandom()

    async def serve(stop: Stop) -> None:
        await GatewayProcess(config, clock, rng).serve(stop)

    return run_until_signal(serve)


if __name__ == "__main__":
    sys.exit(main())

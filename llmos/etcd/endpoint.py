"""One etcd member: its channel, and single attempts of calls on it. No retries here."""

from __future__ import annotations

import math
from typing import Any

import grpc
import grpc.aio

from llmos.clock import Clock
from llmos.errors import ConfigError, EtcdUnavailable
from llmos.etcd.config import EtcdConfig
from llmos.etcd.rpcs import Rpc

Metadata = tuple[tuple[str, str], ...]

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A member that comes back is to be found within a second; gRPC's own back-off grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # also the limit of one connection attempt: a frozen member accepts TCP
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A connection into a black hole is given up after 13 s. etcd drops clients that ping more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    # etcd bounds what it stores, not what it sends: a watch that catches up may get much at once.
    ("grpc.max_receive_message_length", -1),
    # Clients in one process must not share a connection and its back-off.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


def credentials(config: EtcdConfig) -> grpc.ChannelCredentials | None:
    """Read the TLS files. Returns None without TLS; raises ConfigError for a file that cannot be read."""
    if not config.tls:
        return None
    try:
        ca, key, cert = (
            None if path is None else path.read_bytes() for path in (config.ca_file, config.key_file, config.cert_file)
        )
    except OSError as error:
        raise ConfigError(f"A TLS file for etcd cannot be read: {error.strerror}", param="ca_file") from error
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


def open_channel(target: str, channel_credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """Open a channel to host:port; None: without TLS."""
    if channel_credentials is None:
        return grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(target, channel_credentials, options=_CHANNEL_OPTIONS)


class Endpoint:
    """Owns the channel to `target`. `answered_at` is the time of the last sign of life on the clock, -inf for none."""

    def __init__(self, target: str, channel: grpc.aio.Channel, clock: Clock) -> None:
        self.target = target
        self.answered_at = -math.inf
        self._clock = clock
        self._channel = channel

    async def unary(self, rpc: Rpc, request: Any, timeout_s: float, metadata: Metadata) -> Any:
        """One call, one answer. Raises grpc.aio.AioRpcError, or EtcdUnavailable for an answer that cannot be read."""
        method = self._channel.unary_unary(
            rpc.path, request_serializer=rpc.serialize, response_deserializer=rpc.deserialize
        )
        answer = await method(request, timeout=timeout_s, metadata=grpc.aio.Metadata(*metadata))
        return self._readable(answer)

    async def one_shot(self, rpc: Rpc, request: Any, timeout_s: float, metadata: Metadata) -> Any:
        """Send one message on a bidirectional stream, close our side, return the one answer.

        Raises grpc.aio.AioRpcError, or EtcdUnavailable for a stream without a readable answer. It reads to the end of
        the stream: one that ends by itself leaves nothing behind, a cancelled one may (grpc issue 43360).
        """
        method = self._channel.unary_stream(
            rpc.path, request_serializer=rpc.serialize, response_deserializer=rpc.deserialize
        )
        answers = [answer async for answer in method(request, timeout=timeout_s, metadata=_with_leader(metadata))]
        if not answers:
            raise EtcdUnavailable("etcd closed the stream without an answer")
        return self._readable(answers[-1])

    def open_stream(self, rpc: Rpc, metadata: Metadata) -> Any:
        """Start a bidirectional stream without a deadline. The caller owns it and must cancel it."""
        method = self._channel.stream_stream(
            rpc.path, request_serializer=rpc.serialize, response_deserializer=rpc.deserialize
        )
        return method(metadata=_with_leader(metadata))

    def _readable(self, answer: Any) -> Any:
        if answer is None:  # how gRPC hands over what it cannot parse
            raise EtcdUnavailable("etcd sent an answer that cannot be read")
        self.alive()
        return answer

    def alive(self) -> None:
        """Record a sign of life."""
        self.answered_at = self._clock.monotonic()

    async def close(self) -> None:
        await self._channel.close()


def _with_leader(metadata: Metadata) -> grpc.aio.Metadata:
    """A member that lost its cluster ends such a stream, instead of holding it open in silence."""
    return grpc.aio.Metadata(*metadata, ("hasleader", "true"))

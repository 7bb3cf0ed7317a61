"""gRPC servers and channels as every llmos process opens them.

Health and reflection services, mutual TLS, keep-alive, typed errors. Keep-alive runs on both ends, because TCP takes
minutes to notice a silent partition; it is slower than the heartbeats on our own streams, so that a peer starved of
processor time for some seconds keeps its connection. Errors: a handler raises `LlmosError`; the interceptor turns it
into a status with trailing metadata.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from llmos.addresses import host_port
from llmos.config import TlsConfig
from llmos.errors import ConfigError, DeadlineExceeded, LlmosError, Unauthenticated, Unavailable, from_code
from llmos.sealed import Opener, sealing

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
CODE_KEY = "llmos-error-code"
PARAM_KEY = "llmos-error-param"
RETRY_KEY = "retry-after"
SHOULD_RETRY_KEY = "x-should-retry"
_RETRY_STATUSES = frozenset({429, 503})
_DEFAULT_RETRY_S = 1.0

_LIMITS = [
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
_SERVER_OPTIONS = [
    *_LIMITS,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
]
_CHANNEL_OPTIONS = [
    *_LIMITS,
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # grpc 1.71 does not notice a frozen peer by the line above alone; by this one it does.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC takes http_proxy from the environment; what stands there is for the world outside, not for our own services.
    ("grpc.enable_http_proxy", 0),
]


def _read(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the TLS file {file.name}: {error.strerror}") from error


def open_channel(address: str, tls: TlsConfig | None = None) -> grpc.aio.Channel:
    """Open a channel to host:port. The caller closes it. With TLS, the server must be signed by `tls.ca_file`."""
    if tls is None or not tls.enabled:
        return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(_read(tls.ca_file), _read(tls.key_file), _read(tls.cert_file))
    return grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)


def error_from_rpc(error: grpc.aio.AioRpcError) -> LlmosError:
    """The typed error behind a failed call; a transport failure becomes Unavailable or DeadlineExceeded."""
    trailing = {key: value for key, value in (error.trailing_metadata() or ()) if isinstance(value, str)}
    message = error.details() or error.code().name
    if CODE_KEY in trailing:
        retry = trailing.get(RETRY_KEY)
        wait = float(retry) if retry else None
        return from_code(trailing[CODE_KEY], message, param=trailing.get(PARAM_KEY), retry_after_s=wait)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("The service did not answer in time.")
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return Unauthenticated(message)
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return Unavailable("The service cannot be reached.")
    return LlmosError(f"{error.code().name}: {message}")


def trailing_metadata(error: LlmosError) -> tuple[tuple[str, str], ...]:
    """How an error travels beside its status."""
    pairs = [(CODE_KEY, error.code)]
    if error.param and error.param.isascii() and error.param.isprintable():
        pairs.append((PARAM_KEY, error.param))
    worth = error.http_status in _RETRY_STATUSES  # as over HTTP
    pairs.append((SHOULD_RETRY_KEY, "true" if worth else "false"))
    if worth or error.retry_after_s is not None:
        pairs.append((RETRY_KEY, f"{error.retry_after_s or _DEFAULT_RETRY_S:.3f}"))
    return tuple(pairs)


async def _abort(context: Any, error: BaseException) -> None:
    if isinstance(error, LlmosError):
        await context.abort(error.grpc_status, error.message, trailing_metadata(error))
    log.error("unexpected error in a handler", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error", ((CODE_KEY, "internal_error"),))


class _Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Maps exceptions of handlers to a status; a handler that aborts by itself is left alone. Seals and checks messages
    (`llmos.sealed`)."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            wrapped = _streaming(behaviour)
        else:
            behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            wrapped = _unary(behaviour)
        # Called for each call, so that each has its own opener.
        return make(wrapped, Opener(handler.request_deserializer), sealing(handler.response_serializer))


def _unary(behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await behaviour(request, context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            await _abort(context, error)

    return call


def _streaming(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def call(request: Any, context: Any) -> Any:
        answers = behaviour(request, context)
        try:
            if not hasattr(answers, "__aiter__"):
                await answers
                return
            async for answer in answers:
                yield answer
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            await _abort(context, error)
        finally:
            if hasattr(answers, "aclose"):
                await answers.aclose()

    return call


class RpcServer:
    """One gRPC server: `add` services, `start`, `stop`. It answers health checks and reflection by itself."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: TlsConfig | None = None,
        require_client_cert: bool = True,
        share_port: bool = False,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self._address = host_port(host, port)
        self._tls = tls or TlsConfig()
        self._require_client_cert = require_client_cert
        options = [*_SERVER_OPTIONS, ("grpc.so_reuseport", int(share_port))]
        self._server = grpc.aio.server(interceptors=[_Interceptor(), *interceptors], options=options)
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []
        self.port = 0
        """The port that is listened on, once started."""

    def add(self, add_to_server: Callable[[Any, grpc.aio.Server], None], servicer: object, name: str) -> None:
        """Offer a service; `name` is its full name, as `llmos.v1.Inference`."""
        add_to_server(servicer, self._server)
        self._names.append(name)

    def bind(self) -> int:
        """Take the port, and return it; connections wait until `start`. Raises ConfigError if the address is taken."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)
        try:
            self.port = self._bind()
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {self._address}: the port is taken or not allowed") from error
        return self.port

    async def start(self) -> int:
        """Serve. Returns the port. Raises ConfigError if the address is taken."""
        if not self.port:
            self.bind()
        await self._server.start()
        await self.set_serving(True)
        return self.port

    def _bind(self) -> int:
        if not self._tls.enabled:
            return int(self._server.add_insecure_port(self._address))
        key, cert, ca = _read(self._tls.key_file), _read(self._tls.cert_file), _read(self._tls.ca_file)
        if key is None or cert is None:
            raise ConfigError("a TLS server needs cert_file and key_file (`llmos certs DIR` makes them)")
        credentials = grpc.ssl_server_credentials([(key, cert)], ca, self._require_client_cert)
        return int(self._server.add_secure_port(self._address, credentials))

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers, for the server and each of its services."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ["", *self._names]:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s` seconds, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

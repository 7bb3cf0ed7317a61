"""One Watch RPC on one endpoint. It notices when that endpoint goes silent."""

from __future__ import annotations

import asyncio
from typing import Any, Self

import grpc
import grpc.aio

from llmos.errors import EtcdError, EtcdUnavailable
from llmos.etcd import messages as pb
from llmos.etcd.endpoint import Endpoint, Metadata
from llmos.etcd.failures import Reaction, reaction, to_error
from llmos.etcd.rpcs import WATCH
from llmos.etcd.transport import Transport

_CLOSE_S = 1.0


class WatchStream:
    """Reads answers one by one; asks for progress when there is silence, and fails if that is not answered.

    TCP may take many minutes to report a frozen peer, so silence is measured here. Any answer is a sign of life.
    Progress that a client asked for can be ahead of events still to come (etcd issue 15220): it proves life and
    nothing else. Every method raises EtcdUnavailable if another stream may do better, other EtcdErrors if not.
    """

    def __init__(self, transport: Transport, endpoint: Endpoint, metadata: Metadata) -> None:
        self._transport = transport
        self._endpoint = endpoint
        self._metadata = metadata
        self._call = endpoint.open_stream(WATCH, metadata)
        self._reading: asyncio.Task[Any] | None = None

    @classmethod
    async def open(cls, transport: Transport) -> Self:
        """Start the RPC on the endpoint that worked last."""
        endpoint = transport.endpoint
        try:
            metadata = await transport.tokens.metadata(endpoint, transport.config.call_timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _failed(transport, endpoint, (), error) from error
        return cls(transport, endpoint, metadata)

    async def create(self, key: bytes, range_end: bytes, start_revision: int) -> Any:
        """Ask for the changes from `start_revision` on. Returns the first answer, which says whether etcd agreed."""
        request = pb.WatchCreateRequest(key=key, range_end=range_end, start_revision=start_revision)
        await self._write(pb.WatchRequest(create_request=request))
        answer = await self._answer_within(self._transport.config.call_timeout_s)
        if answer is None:
            raise self._silent()
        return answer

    async def read(self) -> Any:
        """Wait for the next answer, however long, as long as the endpoint shows that it lives.

        Cancelling it loses nothing: the next call returns the answer.
        """
        config = self._transport.config
        answer = await self._answer_within(config.watch_idle_s)
        if answer is not None:
            return answer
        await self._write(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
        answer = await self._answer_within(config.call_timeout_s)
        if answer is None:
            raise self._silent()
        return answer

    async def close(self) -> None:
        """Cancel the RPC and wait for its end."""
        self._call.cancel()
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=_CLOSE_S)
            if self._reading.done() and not self._reading.cancelled():
                self._reading.exception()  # marks it as seen: what a closed stream says does not matter
            self._reading = None

    def token_refused(self) -> None:
        """Use a new token for the next stream."""
        self._transport.tokens.forget(self._metadata)

    async def _write(self, request: Any) -> None:
        try:
            async with asyncio.timeout(self._transport.config.call_timeout_s):
                await self._call.write(request)
        except TimeoutError:
            raise self._silent() from None
        except asyncio.InvalidStateError:  # grpc.aio: the RPC is over; reading says why
            await self._read_end()
        except grpc.aio.AioRpcError as error:
            raise _failed(self._transport, self._endpoint, self._metadata, error) from error

    async def _read_end(self) -> None:
        while await self._answer_within(self._transport.config.call_timeout_s) is not None:
            continue
        raise self._silent()

    async def _answer_within(self, limit_s: float) -> Any | None:
        """Return an answer, or None after `limit_s`. The pending read stays: cancelling it would cancel the RPC."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._call.read(), name="etcd-watch-read")
        await asyncio.wait({self._reading}, timeout=limit_s)
        if not self._reading.done():
            return None
        reading, self._reading = self._reading, None
        if reading.cancelled():
            raise EtcdUnavailable("The watch was closed")
        try:
            answer = reading.result()
        except grpc.aio.AioRpcError as error:
            raise _failed(self._transport, self._endpoint, self._metadata, error) from error
        if answer is grpc.aio.EOF or answer is None:  # None: what gRPC cannot parse
            self._transport.leave(self._endpoint)
            raise EtcdUnavailable("etcd ended the watch" if answer is not None else "etcd sent what cannot be read")
        self._endpoint.alive()
        return answer

    def _silent(self) -> EtcdError:
        self._transport.leave(self._endpoint)
        return EtcdUnavailable(f"etcd at {self._endpoint.target} has gone silent")


def _failed(transport: Transport, endpoint: Endpoint, used: Metadata, error: grpc.aio.AioRpcError) -> EtcdError:
    """Draw the consequences of a failed RPC; return the error to raise."""
    code, details = error.code(), error.details() or ""
    match reaction(code, details, has_user=transport.tokens.has_user):
        case Reaction.GIVE_UP:
            return to_error(code, details)
        case Reaction.REFRESH_TOKEN:
            transport.tokens.forget(used)
        case Reaction.TRY_ELSEWHERE:
            transport.leave(endpoint)
    return EtcdUnavailable(f"The watch broke: {details}")

"""Calls that find a living endpoint: deadline, fail-over, back-off, auth token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
import grpc.aio

from llmos.clock import Clock
from llmos.errors import EtcdAuthFailed, EtcdError, EtcdUnavailable
from llmos.etcd import messages as pb
from llmos.etcd.backoff import Backoff
from llmos.etcd.config import EtcdConfig
from llmos.etcd.endpoint import Endpoint, Metadata, credentials, open_channel
from llmos.etcd.failures import Reaction, is_auth_disabled, reaction, to_error
from llmos.etcd.rpcs import AUTHENTICATE, LEASE_KEEP_ALIVE, RANGE, Rpc

Connect = Callable[[str, grpc.ChannelCredentials | None], grpc.aio.Channel]
"""Opens a channel to host:port; a simulation brings its own."""

_FRESH_S = 1.0
"""An endpoint that answered this recently is trusted with a write that must not be sent twice."""

_MAX_TOKEN_REFRESHES = 2
_SHORTEST_S = 0.01


class Answer(NamedTuple):
    """An answer, and when the attempt that got it was sent (seconds on the clock)."""

    message: Any
    sent_at: float


class Tokens:
    """The auth token. Got on first use, forgotten when a server does not know it any more."""

    def __init__(self, user: str, password: str) -> None:
        self._user = user
        self._password = password
        self._metadata: Metadata | None = None if user else ()

    @property
    def has_user(self) -> bool:
        return bool(self._user)

    async def metadata(self, endpoint: Endpoint, timeout_s: float) -> Metadata:
        """What to send with a call. Asks `endpoint` for a token if there is none. Raises grpc.aio.AioRpcError."""
        if self._metadata is None:
            self._metadata = await self._authenticate(endpoint, timeout_s)
        return self._metadata

    def forget(self, used: Metadata) -> None:
        """Drop the token, unless another call already got a newer one than `used`."""
        if self.has_user and self._metadata == used:
            self._metadata = None

    async def _authenticate(self, endpoint: Endpoint, timeout_s: float) -> Metadata:
        request = pb.AuthenticateRequest(name=self._user, password=self._password)
        try:
            answer = await endpoint.unary(AUTHENTICATE, request, timeout_s, ())
        except grpc.aio.AioRpcError as error:
            if is_auth_disabled(error.details() or ""):
                return ()
            raise
        return (("token", answer.token),)


@dataclass
class _Call:
    """One call on its way through the endpoints."""

    rpc: Rpc
    request: Any
    repeatable: bool
    ends_at: float
    endpoints: int
    patience_s: float
    backoff: Backoff
    trying: Endpoint | None = None
    used: Metadata = ()
    sent: bool = False
    failures: int = 0
    refreshes: int = 0
    last_error: EtcdError | None = None

    def left_s(self) -> float:
        """Seconds until the call's deadline."""
        return max(_SHORTEST_S, self.ends_at - asyncio.get_running_loop().time())

    def share_s(self) -> float:
        """Seconds for the next attempt: what is left, shared with the endpoints not tried in this round.

        A member that forwards a write to a leader that has just died answers after 5 s, whereas the next attempt is
        done in no time. So patience is short at first, and doubles with every round for what really takes long.
        """
        rounds, tried = divmod(self.failures, self.endpoints)
        return min(self.left_s() / (self.endpoints - tried), self.patience_s * 2.0**rounds)


class Transport:
    """Owns one channel per endpoint. Calls go to the endpoint that worked last; a failure moves on to the next."""

    def __init__(self, config: EtcdConfig, clock: Clock, rng: random.Random, connect: Connect = open_channel) -> None:
        self.config = config
        self.clock = clock
        self._connect = connect
        self.tokens = Tokens(config.user, config.password)
        self._rng = rng
        self._endpoints: list[Endpoint] = []
        self._current = 0

    def open(self) -> None:
        """Create the channels; connections are made on first use. Raises ConfigError for unreadable TLS files."""
        secrets = credentials(self.config)
        targets = self.config.targets
        self._endpoints = [Endpoint(target, self._connect(target, secrets), self.clock) for target in targets]

    async def close(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.close()
        self._endpoints = []

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint to try next. Raises EtcdUnavailable if the client is not open."""
        if not self._endpoints:
            raise EtcdUnavailable("The etcd client is closed")
        return self._endpoints[self._current]

    def leave(self, endpoint: Endpoint) -> None:
        """Prefer another endpoint from now on. Does nothing if another call has already moved on."""
        if self._endpoints and self.endpoint is endpoint:
            self._current = (self._current + 1) % len(self._endpoints)

    def backoff(self) -> Backoff:
        """A fresh back-off for one loop."""
        return Backoff(self._rng)

    async def call(self, rpc: Rpc, request: Any, *, timeout_s: float | None = None, repeatable: bool = True) -> Any:
        """Return the answer's message; see `timed_call`."""
        return (await self.timed_call(rpc, request, timeout_s=timeout_s, repeatable=repeatable)).message

    async def timed_call(
        self, rpc: Rpc, request: Any, *, timeout_s: float | None = None, repeatable: bool = True
    ) -> Answer:
        """Try endpoint after endpoint until one answers or `timeout_s` (default: the configured one) is over.

        `repeatable=False` is for what must not be applied twice: it is sent only to an endpoint that just showed to be
        alive, and once it may have been applied there is no second attempt. Raises EtcdUnavailable (then the outcome of
        a write is unknown), EtcdAuthFailed, LeaseLost, or EtcdError if etcd refused.
        """
        limit_s = self.config.call_timeout_s if timeout_s is None else timeout_s
        call = self._new_call(rpc, request, repeatable, limit_s)
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    answer = await self._attempt(self.endpoint, call)
                    if answer is not None:
                        return answer
        except TimeoutError:
            if call.trying is not None:
                self.leave(call.trying)
            raise _timed_out(call, limit_s) from call.last_error

    def _new_call(self, rpc: Rpc, request: Any, repeatable: bool, limit_s: float) -> _Call:
        endpoints = max(1, len(self._endpoints))
        return _Call(
            rpc=rpc,
            request=request,
            repeatable=repeatable,
            ends_at=asyncio.get_running_loop().time() + limit_s,
            endpoints=endpoints,
            patience_s=self.config.call_timeout_s / endpoints,
            backoff=self.backoff(),
        )

    async def _attempt(self, endpoint: Endpoint, call: _Call) -> Answer | None:
        """Return the answer, None for "try again", or raise what is final."""
        call.sent = False
        call.trying = endpoint
        try:
            call.used = await self.tokens.metadata(endpoint, call.share_s())
            if not call.repeatable:
                await self._check_alive(endpoint, call)
            call.sent = True
            return await self._send(endpoint, call)
        except grpc.aio.AioRpcError as error:
            await self._recover(endpoint, call, error.code(), error.details() or "")
        except EtcdUnavailable as error:
            await self._recover(endpoint, call, grpc.StatusCode.UNAVAILABLE, error.message)
        except asyncio.CancelledError:
            if _is_being_cancelled():
                raise
            raise EtcdUnavailable("The etcd client was closed during the call") from None
        return None

    async def _send(self, endpoint: Endpoint, call: _Call) -> Answer:
        sent_at = self.clock.monotonic()
        limit_s = call.share_s() if call.repeatable else call.left_s()
        attempt = endpoint.one_shot if call.rpc is LEASE_KEEP_ALIVE else endpoint.unary
        return Answer(await attempt(call.rpc, call.request, limit_s, call.used), sent_at)

    async def _check_alive(self, endpoint: Endpoint, call: _Call) -> None:
        """Read through consensus, so that a member that is frozen, gone or cut off never sees the write."""
        if self.clock.monotonic() - endpoint.answered_at <= _FRESH_S:
            return
        try:
            await endpoint.unary(RANGE, pb.RangeRequest(key=b"health", keys_only=True), call.share_s(), call.used)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.PERMISSION_DENIED:  # a refusal is an answer, too
                raise
            endpoint.alive()

    async def _recover(self, endpoint: Endpoint, call: _Call, code: grpc.StatusCode, details: str) -> None:
        """Prepare the next attempt; raise if there must be none."""
        call.last_error = to_error(code, details)
        match reaction(code, details, has_user=self.tokens.has_user):
            case Reaction.GIVE_UP:
                raise call.last_error
            case Reaction.REFRESH_TOKEN:
                call.refreshes += 1
                if call.refreshes > _MAX_TOKEN_REFRESHES:
                    raise EtcdAuthFailed(f"etcd refuses fresh tokens: {details}")
                self.tokens.forget(call.used)
            case Reaction.TRY_ELSEWHERE:
                self.leave(endpoint)
                if call.sent and not call.repeatable:
                    raise EtcdUnavailable(f"etcd broke off, the outcome of the write is unknown: {details}")
                call.trying = None
                call.failures += 1
                if call.failures % call.endpoints == 0:
                    await asyncio.sleep(call.backoff.next_s())


def _timed_out(call: _Call, limit_s: float) -> EtcdUnavailable:
    if call.sent and not call.repeatable:
        return EtcdUnavailable(f"etcd did not answer within {limit_s:g} s, the outcome of the write is unknown")
    reason = "" if call.last_error is None else f"; last: {call.last_error.message}"
    return EtcdUnavailable(f"No etcd endpoint answered within {limit_s:g} s{reason}")


def _is_being_cancelled() -> bool:
    """Whether somebody wants this task to end; grpc.aio raises CancelledError also when its channel is closed."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0

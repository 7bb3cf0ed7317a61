"""A real HTTP server on a free port in front of a scripted engine."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.authenticator import KeyAuthenticator
from gateway.config import HttpLimits
from gateway.http.api import Api
from gateway.http.app import build_app
from gateway.http.server import HttpServer
from gateway.metrics import MeteredEngine, Metrics
from gateway.types import ModelInfo
from llmos.clock import SystemClock
from llmos.keys import KeyRing
from tests.fakes.engine import MODEL, Asked, FakeEngine, Script

HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Running:
    """A server, what is behind it, and clients of it."""

    engine: FakeEngine
    metrics: Metrics
    server: HttpServer
    http: httpx.AsyncClient
    client: openai.AsyncOpenAI
    """Validates every response against OpenAI's types."""
    lenient: openai.AsyncOpenAI
    """The same without that validation."""

    @property
    def port(self) -> int:
        return self.server.port

    async def chat(self, **fields: Any) -> httpx.Response:
        """POST a chat body, with defaults for what a test does not care about."""
        return await self.http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **fields})


Serve = Callable[..., Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve(script=..., limits=..., keys_file=...)` starts a server that ends with the test."""
    async with AsyncExitStack() as stack:

        async def start(
            script: Script | Callable[[Asked], Script] | None = None,
            *,
            limits: HttpLimits | None = None,
            keys_file: Path | None = None,
            key: str = "any",
            served: Sequence[ModelInfo] = (MODEL,),
        ) -> Running:
            engine = FakeEngine(script if callable(script) else lambda request: script or Script(), served)
            return await _start(stack, engine, limits or HttpLimits(), keys_file, key)

        yield start


async def _start(
    stack: AsyncExitStack, engine: FakeEngine, limits: HttpLimits, keys_file: Path | None, key: str
) -> Running:
    clock, metrics, numbers = SystemClock(), Metrics(), itertools.count()
    api = Api(
        MeteredEngine(engine, metrics, clock), KeyAuthenticator(KeyRing(keys_file)), metrics, limits, version="1.2.3"
    )
    app = build_app(api, clock=clock, new_id=lambda: f"made-{next(numbers)}")
    server = HttpServer(app, "127.0.0.1", 0, limits=limits, new_id=lambda: f"refused-{next(numbers)}")
    await server.start()
    stack.push_async_callback(server.stop)
    stack.callback(server.cut)
    url = f"http://127.0.0.1:{server.port}"
    # No certificates: to load them takes longer than most tests.
    http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=20, verify=False))
    client = await stack.enter_async_context(
        openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key=key,
            max_retries=0,
            timeout=20,
            http_client=openai.DefaultAsyncHttpxClient(verify=False),
            _strict_response_validation=True,
        )
    )
    lenient = client.with_options(_extra_kwargs={"_strict_response_validation": False})
    return Running(engine, metrics, server, http, client, lenient)

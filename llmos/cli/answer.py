"""A streamed chat over the gateway's HTTP API, with nothing but the standard library."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

from llmos.errors import Unavailable, from_code

_TIMEOUT_S = 300.0
_DATA = b"data:"
_DONE = "[DONE]"


def stream_answer(http_url: str, api_key: str, model: str, prompt: str, max_tokens: int) -> Iterator[str]:
    """Pieces of the greedy answer to `prompt`. Raises its typed error, or Unavailable if the stream is cut."""
    parts = urlsplit(http_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
    }
    headers = {"content-type": "application/json", "authorization": f"Bearer {api_key or 'none'}"}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise _typed(json.loads(response.read()))
        yield from texts(response)
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        raise Unavailable("the gateway's answer broke off: see its log") from error
    finally:
        connection.close()


def texts(lines: Iterable[bytes]) -> Iterator[str]:
    """Texts of a stream of server-sent events. It must end with [DONE]: a stream that just ends was cut."""
    for line in lines:
        if not line.startswith(_DATA):
            continue
        data = line.removeprefix(_DATA).strip().decode()
        if data == _DONE:
            return
        event = json.loads(data)
        if "error" in event:
            raise _typed(event)
        for choice in event.get("choices", []):
            yield choice.get("delta", {}).get("content") or ""
    raise Unavailable("the gateway's answer broke off: see its log")


def _typed(document: dict[str, dict[str, str | None]]) -> Exception:
    error = document.get("error", {})
    return from_code(error.get("code") or "internal_error", error.get("message") or "the gateway gave no reason")

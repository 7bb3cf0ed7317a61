"""OpenAI's response shapes for chat and completions. Pure: events in, JSON values out."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.tiers import Tier
from gateway.types import Delta, Done, Finish, Held, Started, TokenLogprob, View
from llmos.errors import InternalError

Json = dict[str, Any]

_LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity; OpenAI's API says this instead."""


class ChoiceProgress:
    """How far a choice has come: tokens and characters that its client has."""

    def __init__(self) -> None:
        self.tokens = 0
        self.chars = 0
        self.ended = False
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def advance(self, delta: Delta) -> None:
        """Count a delta."""
        self.tokens = delta.index + len(delta.token_ids)
        self.chars += len(delta.text)
        self.ended = delta.finish is not None

    def begin_at(self, held: Held) -> None:
        """The client has the beginning from an earlier connection."""
        self.tokens, self.chars, self.ended = held.tokens, held.chars, held.ended
        self._offset = held.chars

    @property
    def event_id(self) -> str:
        """Without the choice's number."""
        return f"{self.tokens}:{self.chars}:end" if self.ended else f"{self.tokens}:{self.chars}"

    def text_offset(self, token: TokenLogprob) -> int:
        """Where in the choice's text the next token begins, in characters."""
        offset = self._offset
        self._offset += len(self._decoder.decode(token.raw))
        return offset


class Shape(ABC):
    """The shape of one response. Keeps the progress of its choices."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self,
        *,
        include_usage: bool = False,
        logprobs: bool = False,
        tier: Tier | None = None,
        unfinished: Finish | None = None,
    ) -> None:
        """`tier` is echoed, `unfinished` said by completions on events before a choice's last one, where it is set."""
        self._include_usage = include_usage
        self._logprobs = logprobs
        self._tier = tier
        self._unfinished = unfinished
        self._started: Started | None = None
        self._progress: dict[int, ChoiceProgress] = {}
        self.is_taken_up = False
        """Its client has the beginning from an earlier connection."""

    def start(self, started: Started) -> None:
        """Note what every chunk repeats. Comes first."""
        self._started = started

    def take_up(self, held: Sequence[Held]) -> None:
        """Go on after what the client has."""
        for one in held:
            self.is_taken_up = True
            self.progress_of(one.choice).begin_at(one)

    def opening(self, choice: int) -> Json | None:
        """What a choice's stream begins with, if anything."""
        return None

    def is_new(self, choice: int) -> bool:
        """Whether nothing of this choice was seen."""
        return choice not in self._progress

    def progress_of(self, choice: int) -> ChoiceProgress:
        """How far a choice has come; the caller may count it on."""
        progress = self._progress.get(choice)
        if progress is None:
            progress = self._progress[choice] = ChoiceProgress()
        return progress

    def chunk(self, delta: Delta) -> Json:
        """One chunk of a stream."""
        progress = self.progress_of(delta.choice)
        progress.advance(delta)
        logprobs = self._logprobs_of(delta.logprobs, progress) if self._logprobs and delta.logprobs else None
        return self._envelope([self._chunk_choice(delta, logprobs)])

    def text_chunk(self, choice: int, text: str) -> Json:
        """A chunk that brings nothing but text; counts nothing."""
        return self._envelope([self._chunk_choice(Delta(choice, 0, text, ()), None)])

    def usage_chunk(self, done: Done) -> Json | None:
        """The chunk of token counts that ends a stream, if asked for."""
        return {**self._envelope([]), "usage": usage(done)} if self._include_usage else None

    def event_id(self) -> str:
        """What the client has so far, as `choice:tokens:characters` per choice, for `Last-Event-ID`."""
        return ",".join(f"{choice}:{at.event_id}" for choice, at in sorted(self._progress.items()))

    def whole(self, deltas: Mapping[int, Sequence[Delta]], done: Done) -> Json:
        """The response of a request that was not streamed."""
        choices = [self._whole_choice(choice, deltas[choice]) for choice in sorted(deltas)]
        return {**self._envelope(choices), "object": self.whole_object, "usage": usage(done)}

    def _envelope(self, choices: list[Json]) -> Json:
        started = self._started
        if started is None:
            raise InternalError("output before the start")
        envelope: Json = {
            "id": f"{self.prefix}-{started.request_id}",
            "object": self.chunk_object,
            "created": started.created_unix_s,
            "model": started.model,
            "choices": choices,
            "system_fingerprint": started.model_version or None,
        }
        if self._tier is not None:
            envelope["service_tier"] = self._tier
        if self._include_usage:
            envelope["usage"] = None
        return envelope

    def _whole_choice(self, choice: int, deltas: Sequence[Delta]) -> Json:
        entries = [entry for delta in deltas for entry in delta.logprobs]
        logprobs = self._logprobs_of(entries, ChoiceProgress()) if self._logprobs else None
        text = "".join(delta.text for delta in deltas)
        return self._finished_choice(choice, text, logprobs, deltas[-1].finish if deltas else None)

    @abstractmethod
    def _chunk_choice(self, delta: Delta, logprobs: Json | None) -> Json: ...

    @abstractmethod
    def _finished_choice(self, choice: int, text: str, logprobs: Json | None, finish: Finish | None) -> Json: ...

    @abstractmethod
    def _logprobs_of(self, entries: Sequence[TokenLogprob], progress: ChoiceProgress) -> Json: ...


def shape_of(kind: str, view: View) -> Shape:
    """The shape in which an answer of that kind (`chat`, `completion`) was first shown."""
    if kind == "chat":
        return ChatShape(include_usage=view.include_usage, logprobs=view.logprobs, tier=view.tier)
    return CompletionShape(
        include_usage=view.include_usage,
        logprobs=view.logprobs,
        tier=view.tier,
        unfinished="length" if view.always_reason else None,
    )


class ChatShape(Shape):
    """`chat.completion` and `chat.completion.chunk`."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, choice: int) -> Json | None:
        """The role, as OpenAI's first chunk of each choice says it."""
        self._progress.setdefault(choice, ChoiceProgress())
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._envelope([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _chunk_choice(self, delta: Delta, logprobs: Json | None) -> Json:
        said = {"content": delta.text} if delta.text or delta.logprobs else {}
        return {"index": delta.choice, "delta": said, "logprobs": logprobs, "finish_reason": delta.finish}

    def _finished_choice(self, choice: int, text: str, logprobs: Json | None, finish: Finish | None) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs_of(self, entries: Sequence[TokenLogprob], progress: ChoiceProgress) -> Json:
        content = [{**_token(entry), "top_logprobs": [_token(other) for other in entry.top]} for entry in entries]
        return {"content": content, "refusal": None}


class CompletionShape(Shape):
    """`text_completion`, streamed or not."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def _chunk_choice(self, delta: Delta, logprobs: Json | None) -> Json:
        reason = delta.finish or self._unfinished
        return {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}

    def _finished_choice(self, choice: int, text: str, logprobs: Json | None, finish: Finish | None) -> Json:
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs_of(self, entries: Sequence[TokenLogprob], progress: ChoiceProgress) -> Json:
        return {
            "tokens": [entry.text for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [{other.text: _finite(other.logprob) for other in entry.top} for entry in entries],
            "text_offset": [progress.text_offset(entry) for entry in entries],
        }


def usage(done: Done) -> Json:
    """OpenAI's token counts."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


def _token(entry: TokenLogprob) -> Json:
    return {"token": entry.text, "logprob": _finite(entry.logprob), "bytes": list(entry.raw)}


def _finite(logprob: float) -> float:
    return logprob if logprob >= _LOWEST_LOGPROB else _LOWEST_LOGPROB

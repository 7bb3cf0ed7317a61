"""The one validator: a body in OpenAI's JSON shape goes in, a GenerationRequest comes out.

HTTP and gRPC both call it, so that a request gets the same verdict at both doors. Pure. Every refusal is an
InvalidRequest (or a leaf of it, or PayloadTooLarge) whose `param` is the path of the offending field, as
`messages[0].content`. Fields that OpenAI's API has and that change nothing here are accepted; `IGNORED_*` lists them.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Mapping, Sequence

from gateway.constraints import constraint_of
from gateway.fields import bound_text, convert, unknown
from gateway.schemas import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_SEED,
    MIN_SEED,
    ChatBody,
    CompletionBody,
    GenerationBody,
    Message,
)
from gateway.tiers import class_of
from gateway.types import GenerationRequest, Held, Params, Progress, Turn
from llmos.errors import InvalidRequest, UnsupportedFeature

MAX_PROMPTS = 16
"""Prompts of one completion body; each makes a request of its own."""
MAX_REQUEST_ID = 128
MAX_TIMEOUT_S = 86_400.0

IGNORED_FIELDS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "store",
        "user",
        "verbosity",
    }
)
"""Accepted and without effect, whatever their value."""
IGNORED_MESSAGE_FIELDS = frozenset({"annotations", "reasoning", "reasoning_content", "refusal", "tool_call_id"})

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
"""Features that are not offered, with the values (besides null) that do not ask for them."""
_CHAT_ONLY = frozenset(
    {"audio", "function_call", "functions", "modalities", "moderation", "tool_choice", "tools", "web_search_options"}
)
_COMPLETION_ONLY = frozenset({"best_of", "echo", "suffix"})
_MESSAGE_NEUTRAL = frozenset({"audio", "function_call", "tool_calls"})
_PART_FIELDS = frozenset({"type", "text", "cache_control"})

_REQUEST_ID = re.compile(rf"[\x21-\x7e]{{1,{MAX_REQUEST_ID}}}")
_POSITION = re.compile(r"(?P<choice>[0-9]{1,4}):(?P<tokens>[0-9]{1,10}):(?P<chars>[0-9]{1,10})(?P<end>:end)?")
_MAX_EVENT_ID = 1024
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def chat_body(body: Mapping[str, object]) -> ChatBody:
    """Check the fields of a chat body one by one."""
    _known_fields(body, ChatBody.__struct_fields__, neutral=_CHAT_ONLY)
    messages = body.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        _check_message(message, f"messages[{index}]")
    return convert(body, ChatBody)


def completion_body(body: Mapping[str, object]) -> CompletionBody:
    """Check the fields of a completion body one by one."""
    _known_fields(body, CompletionBody.__struct_fields__, neutral=_COMPLETION_ONLY)
    return convert(body, CompletionBody)


def chat_request(body: Mapping[str, object] | ChatBody) -> GenerationRequest:
    """The request behind a chat body."""
    checked = body if isinstance(body, ChatBody) else chat_body(body)
    if checked.max_tokens is not None and checked.max_completion_tokens is not None:
        raise InvalidRequest("Give 'max_tokens' or 'max_completion_tokens', not both.", param="max_completion_tokens")
    if checked.top_logprobs is not None and not checked.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    logprobs = checked.top_logprobs or 0 if checked.logprobs else None
    turns = tuple(_turn(message, f"messages[{index}]") for index, message in enumerate(checked.messages))
    bound_text((turn.content for turn in turns), "messages")
    return GenerationRequest(
        kind="chat",
        model=checked.model,
        params=_params(checked, checked.max_completion_tokens or checked.max_tokens, logprobs),
        turns=turns,
        resume=_resume(checked),
        resume_request_id=checked.resume_request_id or "",
        priority=class_of(checked.service_tier),
    )


def completion_request(body: Mapping[str, object] | CompletionBody) -> GenerationRequest:
    """The request behind a completion body with exactly one prompt."""
    requests = completion_requests(body)
    if len(requests) > 1:
        raise InvalidRequest("Only one prompt is possible here.", param="prompt")
    return requests[0]


def completion_requests(body: Mapping[str, object] | CompletionBody) -> tuple[GenerationRequest, ...]:
    """One request per prompt of a completion body."""
    checked = body if isinstance(body, CompletionBody) else completion_body(body)
    params = _params(checked, checked.max_tokens, checked.logprobs)
    prompts = _prompts(checked.prompt)
    if len(prompts) > 1 and checked.resume:
        raise InvalidRequest("A stream of several prompts cannot be resumed.", param="resume")
    bound_text((prompt for prompt in prompts if isinstance(prompt, str)), "prompt")
    return tuple(
        GenerationRequest(
            kind="completion",
            model=checked.model,
            params=params,
            text=prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else prompt,
            resume=_resume(checked),
            resume_request_id=checked.resume_request_id or "",
            priority=class_of(checked.service_tier),
        )
        for prompt in prompts
    )


def request_id(text: str) -> str:
    """A client's own request id: at most 128 printable ASCII characters without blanks."""
    if not _REQUEST_ID.fullmatch(text):
        raise InvalidRequest(
            f"'x-request-id' must have 1 to {MAX_REQUEST_ID} printable ASCII characters and no blanks.",
            param="x-request-id",
        )
    return text


def last_event_id(text: str) -> tuple[Held, ...]:
    """What a client has of a stream, by the `id` of the last event that it got; empty: nothing."""
    if not text:
        return ()
    parts = text.split(",") if len(text) <= _MAX_EVENT_ID else [""]
    found = [_POSITION.fullmatch(part.strip()) for part in parts]
    if len(found) > MAX_CHOICES or not all(found):
        raise InvalidRequest("'last-event-id' is not the id of an event of such a stream.", param="last-event-id")
    return tuple(
        Held(int(match["choice"]), int(match["tokens"]), int(match["chars"]), match["end"] is not None)
        for match in found
        if match is not None
    )


def timeout_s(text: str) -> float:
    """Seconds that a client is willing to wait: above 0, at most a day."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"'x-request-timeout' must be a number of seconds above 0 and at most {MAX_TIMEOUT_S:.0f}.",
            param="x-request-timeout",
        )
    return seconds


def _known_fields(body: Mapping[str, object], known: Collection[str], *, neutral: Collection[str]) -> None:
    if not isinstance(body, Mapping):
        raise InvalidRequest("The body must be a JSON object.")
    for key, value in body.items():
        if key in neutral:
            _not_asked_for(key, value, body, key)
        elif key not in known and key not in IGNORED_FIELDS:
            raise unknown(key, {*known, *neutral, *IGNORED_FIELDS}, str(key))


def _not_asked_for(key: str, value: object, body: Mapping[str, object], path: str) -> None:
    if value is None or value in _NEUTRAL[key] or (key == "best_of" and value == (body.get("n") or 1)):
        return
    raise UnsupportedFeature(f"'{key}' is not supported.", param=path)


def _check_message(message: object, path: str) -> None:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"'{path}' must be an object.", param=path)
    known = {*Message.__struct_fields__, *IGNORED_MESSAGE_FIELDS, *_MESSAGE_NEUTRAL}
    for key, value in message.items():
        if key in _MESSAGE_NEUTRAL:
            _not_asked_for(key, value, message, f"{path}.{key}")
        elif key not in known:
            raise unknown(key, known, f"{path}.{key}")
    content = message.get("content")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        _check_part(part, f"{path}.content[{index}]")


def _check_part(part: object, path: str) -> None:
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"'{path}' must be an object.", param=path)
    kind = part.get("type")
    if isinstance(kind, str) and kind != "text":
        raise UnsupportedFeature(f"'{path}.type' must be 'text': other kinds of content are not supported.", param=path)
    for key in part:
        if key not in _PART_FIELDS:
            raise unknown(key, _PART_FIELDS, f"{path}.{key}")


def _turn(message: Message, path: str) -> Turn:
    content = message.content
    if content is None:
        raise InvalidRequest(f"'{path}.content' is required.", param=f"{path}.content")
    if isinstance(content, list):
        if any(part.text is None for part in content):
            raise InvalidRequest(f"Each part of '{path}.content' needs a 'text'.", param=f"{path}.content")
        content = "".join(part.text or "" for part in content)
    role = "system" if message.role == "developer" else message.role
    return Turn(role=role, content=content, name=message.name or "")


def _prompts(prompt: str | Sequence[int | str | list[int]]) -> list[str | tuple[int, ...]]:
    if isinstance(prompt, str):
        prompts: list[str | tuple[int, ...]] = [prompt]
    elif all(isinstance(part, int) for part in prompt):
        prompts = [tuple(part for part in prompt if isinstance(part, int))]
    elif len({type(part) for part in prompt}) > 1:
        raise InvalidRequest("'prompt' must not mix texts, token ids and lists.", param="prompt")
    elif len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(f"'prompt' has {len(prompt)} prompts; at most {MAX_PROMPTS} are possible.", param="prompt")
    else:
        prompts = [part if isinstance(part, str) else tuple(part) for part in prompt if not isinstance(part, int)]
    if not all(prompts):
        raise InvalidRequest("'prompt' must not be empty.", param="prompt")
    return prompts


def _params(body: GenerationBody, max_tokens: int | None, logprobs: int | None) -> Params:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("'stream_options' needs 'stream' to be true.", param="stream_options")
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest("'min_tokens' must not exceed 'max_tokens'.", param="min_tokens")
    return Params(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=_positive(body.top_p, "top_p"),
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias or {}),
        seed=_seed(body.seed),
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        n=body.n or 1,
        logprobs=logprobs,
        constraint=constraint_of(body),
    )


def _positive(value: float | None, param: str) -> float:
    """`value`, by default 1. It travels as float32, so what that type rounds to zero is no positive number."""
    if value is None:
        return 1.0
    if struct.unpack("f", struct.pack("f", value))[0] <= 0:
        raise InvalidRequest(f"'{param}' must be above 0.", param=param)
    return value


def _logit_bias(entries: Mapping[str, float]) -> dict[int, float]:
    if len(entries) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"'logit_bias' has more than {MAX_LOGIT_BIAS} entries.", param="logit_bias")
    for key in entries:
        if not _TOKEN_ID.fullmatch(key) or int(key) >= 1 << 32:
            raise InvalidRequest("Keys of 'logit_bias' must be token ids.", param=f"logit_bias.{key[:32]}")
    return {int(key): value for key, value in entries.items()}


def _seed(seed: int | None) -> int | None:
    if seed is None:
        return None
    if not MIN_SEED <= seed <= MAX_SEED:
        raise InvalidRequest("'seed' must fit into 64 bits.", param="seed")
    return seed & MAX_SEED


def _resume(body: GenerationBody) -> tuple[Progress, ...]:
    progress = tuple(
        Progress(part.choice, tuple(part.token_ids), part.text_chars, part.finished) for part in body.resume or ()
    )
    if len({part.choice for part in progress}) < len(progress):
        raise InvalidRequest("'resume' names a choice twice.", param="resume")
    if any(part.choice >= (body.n or 1) for part in progress):
        raise InvalidRequest("'resume' names a choice that 'n' does not have.", param="resume")
    if progress and body.seed is None and body.temperature != 0:
        raise InvalidRequest("'resume' needs the 'seed' that the broken stream reported.", param="seed")
    return progress

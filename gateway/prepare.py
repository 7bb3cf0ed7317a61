"""From a valid request to the fleet's request: render, tokenize, check against the model's bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.trace import Span

from gateway.catalogue import TextRules
from gateway.text.choice import ChoiceText
from gateway.text.prefix import prefix_hashes
from gateway.tiers import granted
from gateway.transcript import Shape, Transcript
from gateway.types import Constraint, GenerationRequest, Identity, Params, TaskRequest
from gateway.values import ValuesTranscript
from llmos.errors import InvalidRequest, LlmosError, PromptTooLong, UnsupportedFeature
from llmos.internal.v1 import request_pb2, requests_pb2
from llmos.telemetry import REQUEST_ID, Telemetry
from llmos.tenants import TenantLimits
from llmos.v1 import inference_pb2

_INLINE_CHARS = 16_384
"""Longer texts are tokenized in a thread: the library lets go of the interpreter while it works."""

_PRIORITY = {
    "interactive": request_pb2.PRIORITY_CLASS_INTERACTIVE,
    "standard": request_pb2.PRIORITY_CLASS_STANDARD,
    "batch": request_pb2.PRIORITY_CLASS_BATCH,
}


_TASK = {"embed": request_pb2.TASK_EMBED, "classify": request_pb2.TASK_CLASSIFY, "score": request_pb2.TASK_SCORE}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the fleet is given to read."""

    token_ids: Sequence[int]
    first_text_tokens: int = 0
    """Length of the first of two texts; 0: there is one."""


async def traced_tokenize(
    request: GenerationRequest | TaskRequest,
    model: requests_pb2.CatalogueModel,
    rules: TextRules,
    telemetry: Telemetry,
    root: Span,
    inner_id: str,
) -> Prompt:
    """`tokenize` under a span of its own below `root`."""
    child = telemetry.start("tokenize", parent=root.get_span_context(), attributes={REQUEST_ID: inner_id})
    try:
        prompt = await tokenize(request, model, rules)
    except LlmosError as error:
        telemetry.finish(child, error.code)
        raise
    child.set_attribute("gen_ai.usage.input_tokens", len(prompt.token_ids))
    telemetry.finish(child)
    return prompt


async def tokenize(
    request: GenerationRequest | TaskRequest, model: requests_pb2.CatalogueModel, rules: TextRules
) -> Prompt:
    """The prompt's tokens. One given as tokens is taken as it is. Raises InvalidRequest."""
    if isinstance(request, TaskRequest):
        return await _tokenize_task(request, model, rules)
    if request.token_ids is not None:
        return Prompt(request.token_ids)
    text, special = _prompt_text(request, rules)
    if len(text) <= _INLINE_CHARS:
        return Prompt(rules.tokenizer.encode(text, special=special))
    return Prompt(await asyncio.to_thread(rules.tokenizer.encode, text, special=special))


async def _tokenize_task(request: TaskRequest, model: requests_pb2.CatalogueModel, rules: TextRules) -> Prompt:
    context = model.context_length
    limit = context if request.truncate == -1 else request.truncate
    if request.token_ids is not None:
        return Prompt(request.token_ids[:limit])
    texts = (request.text or "", request.second)
    if sum(len(text or "") for text in texts) <= _INLINE_CHARS:
        return Prompt(*rules.tokenizer.encode_task(*texts, limit))
    return Prompt(*await asyncio.to_thread(rules.tokenizer.encode_task, *texts, limit))


def _prompt_text(request: GenerationRequest, rules: TextRules) -> tuple[str, bool]:
    """The text, and whether the tokenizer adds its own begin token (a template has written it already)."""
    if request.text is not None:
        return request.text, True
    if rules.template is None:
        raise UnsupportedFeature("The model has no chat template; use completions.", param="model")
    return rules.template.render(request.turns), False


def fit(request: GenerationRequest | TaskRequest, token_ids: Sequence[int], model: requests_pb2.CatalogueModel) -> int:
    """The most tokens per choice. Raises PromptTooLong or InvalidRequest where the model's bounds are passed."""
    if isinstance(request, TaskRequest):
        return _fit_task(request, token_ids, model)
    params = request.params
    if not token_ids:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    _check_vocabulary(params, token_ids, model.vocab_size)
    left = model.context_length - len(token_ids)
    wanted = 1 if params.max_tokens is None else params.max_tokens
    if wanted > left:
        raise PromptTooLong(
            f"The model's context is {model.context_length} tokens; the prompt has {len(token_ids)} and {wanted} "
            "more are asked for. Shorten the prompt or lower max_tokens.",
            param="max_tokens" if params.max_tokens is not None and left > 0 else "prompt",
        )
    budget = left if params.max_tokens is None else params.max_tokens
    if params.min_tokens > budget:
        raise InvalidRequest("min_tokens is larger than max_tokens.", param="min_tokens")
    return budget


def _fit_task(request: TaskRequest, token_ids: Sequence[int], model: requests_pb2.CatalogueModel) -> int:
    """One: what stands for the only output, though it has no token."""
    if not token_ids:
        raise InvalidRequest(f"'{request.param}' is empty.", param=request.param)
    if len(token_ids) > model.context_length:
        raise PromptTooLong(
            f"'{request.param}' has {len(token_ids)} tokens, the model takes {model.context_length}; shorten it, or "
            "set 'truncate_prompt_tokens' to -1.",
            param=request.param,
        )
    if max(token_ids) >= model.vocab_size:
        raise InvalidRequest(f"'{request.param}' names a token that the model does not have.", param=request.param)
    return 1


def _check_vocabulary(params: Params, token_ids: Sequence[int], size: int) -> None:
    for name, ids in (
        ("prompt", token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", tuple(params.logit_bias)),
    ):
        if ids and max(ids) >= size:
            raise InvalidRequest(f"{name} names a token that the model does not have.", param=name)


def fleet_request(
    request: GenerationRequest | TaskRequest,
    identity: Identity,
    model: requests_pb2.CatalogueModel,
    base: requests_pb2.CatalogueModel,
    prompt: Prompt,
    *,
    inner_id: str,
    seed: int,
    max_tokens: int,
    salt: bytes,
) -> request_pb2.Request:
    """The request as scheduler and workers know it; deadline, trace and resume are set when it is submitted.

    `base` is the model itself, or what it applies to if it is an adapter.
    """
    adapter = model if model.base_model else requests_pb2.CatalogueModel()
    params = request.params
    return request_pb2.Request(
        request_id=inner_id,
        tenant=identity.tenant,
        model=base.name,
        model_version=base.version,
        tokenizer_hash=model.tokenizer_hash,
        token_ids=prompt.token_ids,
        prefix_hashes=prefix_hashes(
            () if isinstance(request, TaskRequest) else prompt.token_ids,
            model_version=base.version,
            tenant=identity.tenant,
            adapter=adapter.version,
            salt=salt,
        ),
        sampling=_sampling(params, seed),
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        choices=params.n,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        priority=_PRIORITY[granted(identity.priority, request.priority)],
        adapter=adapter.name,
        adapter_version=adapter.version,
        constraint=None if params.constraint is None else _constraint(params.constraint),
        task=_TASK.get(request.kind, request_pb2.TASK_GENERATE),
        first_text_tokens=prompt.first_text_tokens,
        tenant_weight=identity.limits.weight,
        quota=_quota(identity.limits),
    )


def _quota(limits: TenantLimits) -> request_pb2.TenantQuota | None:
    if not (limits.max_requests or limits.tokens_per_minute):
        return None
    return request_pb2.TenantQuota(max_requests=limits.max_requests, tokens_per_minute=limits.tokens_per_minute)


def _constraint(constraint: Constraint) -> inference_pb2.Constraint:
    match constraint.kind:
        case "json_schema":
            return inference_pb2.Constraint(json_schema=constraint.text)
        case "json_object":
            return inference_pb2.Constraint(json_object=True)
        case "regex":
            return inference_pb2.Constraint(regex=constraint.text)
        case "choice":
            return inference_pb2.Constraint(choice=inference_pb2.ConstraintChoices(texts=constraint.texts))


def _sampling(params: Params, seed: int) -> request_pb2.Sampling:
    return request_pb2.Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias),
        seed=seed,
        logprobs=params.logprobs,
    )


def new_transcript(
    request: GenerationRequest | TaskRequest, rules: TextRules, max_tokens: int, model: requests_pb2.CatalogueModel
) -> Transcript | ValuesTranscript:
    """An empty transcript for a request's output."""
    if isinstance(request, TaskRequest):
        return ValuesTranscript(len(model.labels) or next(iter(model.dimensions), 0))
    params = request.params
    continuation = request.kind == "completion"
    shape = Shape(params.n, max_tokens, model.vocab_size, params.logprobs is not None)

    def new_text() -> ChoiceText:
        return ChoiceText(rules.tokenizer.detokenizer(continuation=continuation), params.stop)

    return Transcript(shape, new_text, rules.tokenizer.token_bytes)

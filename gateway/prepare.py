"""From a valid request to the fleet's request: render, tokenize, check against the model's bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway.catalogue import TextRules
from gateway.text.choice import ChoiceText
from gateway.text.prefix import prefix_hashes
from gateway.transcript import Shape, Transcript
from gateway.types import Constraint, GenerationRequest, Identity, Params
from llmos.errors import InvalidRequest, PromptTooLong, UnsupportedFeature
from llmos.internal.v1 import request_pb2, requests_pb2
from llmos.v1 import inference_pb2

_INLINE_CHARS = 16_384
"""Longer texts are tokenized in a thread: the library lets go of the interpreter while it works."""

_PRIORITY = {
    "interactive": request_pb2.PRIORITY_CLASS_INTERACTIVE,
    "standard": request_pb2.PRIORITY_CLASS_STANDARD,
    "batch": request_pb2.PRIORITY_CLASS_BATCH,
}


async def tokenize(request: GenerationRequest, rules: TextRules) -> Sequence[int]:
    """The prompt's tokens. A completion given as tokens is taken as it is. Raises InvalidRequest."""
    if request.token_ids is not None:
        return request.token_ids
    text, special = _prompt_text(request, rules)
    if len(text) <= _INLINE_CHARS:
        return rules.tokenizer.encode(text, special=special)
    return await asyncio.to_thread(rules.tokenizer.encode, text, special=special)


def _prompt_text(request: GenerationRequest, rules: TextRules) -> tuple[str, bool]:
    """The text, and whether the tokenizer adds its own begin token (a template has written it already)."""
    if request.text is not None:
        return request.text, True
    if rules.template is None:
        raise UnsupportedFeature("The model has no chat template; use completions.", param="model")
    return rules.template.render(request.turns), False


def fit(params: Params, token_ids: Sequence[int], model: requests_pb2.CatalogueModel) -> int:
    """The most tokens per choice. Raises PromptTooLong or InvalidRequest where the model's bounds are passed."""
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


def _check_vocabulary(params: Params, token_ids: Sequence[int], size: int) -> None:
    for name, ids in (
        ("prompt", token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", tuple(params.logit_bias)),
    ):
        if ids and max(ids) >= size:
            raise InvalidRequest(f"{name} names a token that the model does not have.", param=name)


def fleet_request(
    request: GenerationRequest,
    identity: Identity,
    model: requests_pb2.CatalogueModel,
    base: requests_pb2.CatalogueModel,
    token_ids: Sequence[int],
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
        token_ids=token_ids,
        prefix_hashes=prefix_hashes(
            token_ids, model_version=base.version, tenant=identity.tenant, adapter=adapter.version, salt=salt
        ),
        sampling=_sampling(params, seed),
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        choices=params.n,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        priority=_PRIORITY[identity.priority],
        adapter=adapter.name,
        adapter_version=adapter.version,
        constraint=None if params.constraint is None else _constraint(params.constraint),
    )


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


def new_transcript(request: GenerationRequest, rules: TextRules, max_tokens: int, vocab_size: int) -> Transcript:
    """An empty transcript for a request's output."""
    params = request.params
    continuation = request.kind == "completion"
    shape = Shape(params.n, max_tokens, vocab_size, params.logprobs is not None)

    def new_text() -> ChoiceText:
        return ChoiceText(rules.tokenizer.detokenizer(continuation=continuation), params.stop)

    return Transcript(shape, new_text, rules.tokenizer.token_bytes)

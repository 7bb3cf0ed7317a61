"""The models that can be asked for, as the scheduler names them, and the text rules of each: tokenizer and template.

Tokenizers and templates come by hash, are checked against it, and are kept while there is room. Models with the same
files share them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from gateway.text.template import ChatTemplate, EchoTemplate, JinjaTemplate
from gateway.text.tokenizer import ByteTokenizer, HfTokenizer, Tokenizer
from gateway.types import ModelInfo
from llmos.errors import LlmosError, ModelNotFound, Unavailable, UnsupportedFeature
from llmos.internal.v1 import requests_pb2

_KEPT_TOKENIZERS = 16
_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class TextRules:
    """How a model's text becomes tokens and back. `template` is None where the model has no chat."""

    tokenizer: Tokenizer
    template: ChatTemplate | None


class Catalogue:
    """Replaced as a whole by each push; a request keeps the entry that it began with."""

    def __init__(self, fetch: Callable[[str], Awaitable[bytes]], *, kept: int = _KEPT_TOKENIZERS) -> None:
        """`fetch` brings a blob by its sha256 or raises LlmosError; `kept` bounds the tokenizers in memory."""
        self._fetch = fetch
        self._kept = kept
        self._models: dict[str, requests_pb2.CatalogueModel] = {}
        self._begins = True
        """There is no model, but there may be soon."""
        self._seen = (0, 0)
        self._tokenizers: OrderedDict[str, Tokenizer] = OrderedDict()
        self._templates: OrderedDict[tuple[str, str, str], ChatTemplate] = OrderedDict()
        self._loading: dict[str, asyncio.Lock] = {}
        self._changed = asyncio.Event()

    def replace(self, catalogue: requests_pb2.Catalogue, term: int) -> bool:
        """Take a pushed catalogue; False if it is older than the one at hand."""
        if (term, catalogue.revision) < self._seen:
            return False
        self._seen = (term, catalogue.revision)
        self._models = {model.name: model for model in sorted(catalogue.models, key=lambda model: model.name)}
        self._begins = catalogue.loading and not self._models
        self._changed.set()
        return True

    def find(self, name: str, capability: str) -> requests_pb2.CatalogueModel:
        """The model of that name. Raises ModelNotFound, UnsupportedFeature where it lacks the capability, and
        Unavailable while there is no model at all and there may be one soon: the fleet has just begun."""
        model = self._models.get(name)
        if self._begins:
            raise Unavailable("No model is served yet; try again.", retry_after_s=1.0)
        if model is None:
            raise ModelNotFound(f"The model '{name[:200]}' is not served here; list the models.", param="model")
        if capability not in model.capabilities:
            raise UnsupportedFeature(f"The model '{name}' does not offer {capability}.", param="model")
        return model

    def base_of(self, model: requests_pb2.CatalogueModel) -> requests_pb2.CatalogueModel:
        """The model itself, or the one that an adapter applies to. Raises ModelNotFound."""
        if not model.base_model:
            return model
        base = self._models.get(model.base_model)
        if base is None:
            raise ModelNotFound(f"The base of the adapter '{model.name}' is not served at present.", param="model")
        return base

    def models(self) -> Sequence[ModelInfo]:
        """Served models in order of name."""
        return [
            ModelInfo(
                name=model.name,
                version=model.version,
                context_length=model.context_length,
                capabilities=frozenset(model.capabilities),
                created_unix_s=model.created_unix_s,
                base_model=model.base_model,
                labels=tuple(model.labels),
                dimensions=tuple(model.dimensions),
            )
            for model in self._models.values()
        ]

    async def rules(self, model: requests_pb2.CatalogueModel) -> TextRules:
        """Tokenizer and template of a model, fetched if they aren't here. Raises LlmosError."""
        if not model.tokenizer_hash:
            return TextRules(ByteTokenizer(), EchoTemplate())
        tokenizer = self._tokenizers.get(model.tokenizer_hash) or await self._load_tokenizer(model.tokenizer_hash)
        self._tokenizers.move_to_end(model.tokenizer_hash)
        return TextRules(tokenizer, await self._template(model))

    async def prefetch(self) -> None:
        """Keep the text rules of all models at hand, so that no first request waits; until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            for model in list(self._models.values())[: self._kept]:
                with contextlib.suppress(LlmosError):  # fails again, and visibly, for the request that needs it
                    await self.rules(model)

    async def _load_tokenizer(self, blob_hash: str) -> Tokenizer:
        async with self._loading.setdefault(blob_hash, asyncio.Lock()):
            if blob_hash in self._tokenizers:
                return self._tokenizers[blob_hash]
            definition = await self._blob(blob_hash)
            tokenizer = await asyncio.to_thread(HfTokenizer, definition)
            self._tokenizers[blob_hash] = tokenizer
            while len(self._tokenizers) > self._kept:
                evicted, _ = self._tokenizers.popitem(last=False)
                self._loading.pop(evicted, None)
            return tokenizer

    async def _template(self, model: requests_pb2.CatalogueModel) -> ChatTemplate | None:
        if not model.chat_template_hash:
            return None
        key = (model.chat_template_hash, model.bos_token, model.eos_token)
        template = self._templates.get(key)
        if template is None:
            source = (await self._blob(model.chat_template_hash)).decode(errors="replace")
            template = JinjaTemplate(source, bos_token=model.bos_token, eos_token=model.eos_token)
            self._templates[key] = template
            while len(self._templates) > self._kept:
                self._templates.popitem(last=False)
        self._templates.move_to_end(key)
        return template

    async def _blob(self, blob_hash: str) -> bytes:
        for _ in range(_ATTEMPTS):
            try:
                content = await self._fetch(blob_hash)
            except LlmosError as error:
                raise Unavailable("A file of the model can't be fetched now; try again.", retry_after_s=1.0) from error
            if sha256(content).hexdigest() == blob_hash:
                return content
        raise Unavailable("A file of the model arrived damaged; try again.", retry_after_s=1.0)

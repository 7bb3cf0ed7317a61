"""From a constraint and a model's tokens to a compiled grammar. No torch: the checker process imports it too."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llmos.errors import InvalidConstraint, UnsupportedFeature
from worker.backend import Constraint
from worker.engine.grammar.formats import with_patterns

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

PARAM = "constraint"
"""The `param` of refusals; the gateway knows what its client called the field."""
_JSON_STYLE: JsonCompileOptions = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}
"""As `json.dumps` writes it. Free white space would let a model write blanks for ever; a lenient reading of the schema
would let it break the schema."""
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=40_000,
    step_max_items=20_000,
    max_lexer_states=2_000_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""A step's limits are four times what 300 random schemas of rising depth needed (`bench/constrained.py`); they hold a
mask to some ten milliseconds. Lexer states are small, and a long answer to a counted repetition needs 100 a token."""
_MESSAGE_CHARS = 200


class Vocabulary:
    """A model's tokens as grammars see them. Reading one takes 0.3 s for 50,000 tokens."""

    def __init__(self, folder: Path, size: int, end_tokens: Collection[int]) -> None:
        """`size` is the width of the logits. Raises UnsupportedFeature if the folder's tokenizer cannot be used."""
        self.size = size
        self.end_tokens = frozenset(token for token in end_tokens if token < size)
        try:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            self.tokens = _read(text, size, sorted(self.end_tokens))
        except (OSError, ValueError) as error:
            raise UnsupportedFeature("This model's tokenizer cannot be used for constrained output.") from error

    def compile(self, constraint: Constraint) -> LLMatcher:
        """The start of the grammar. Copies share what they learn of the lexer. Raises InvalidConstraint."""
        matcher = LLMatcher(self.tokens, _grammar(constraint), log_level=0, limits=_LIMITS)
        # The first mask is the slowest, and shows whether anything can be said at all.
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            raise refusal(matcher)
        texts = int.from_bytes(mask, "little") & ~sum(1 << token for token in self.tokens.eos_tokens)
        if not texts:
            raise InvalidConstraint("The constraint allows no text but the empty one.", param=PARAM)
        return matcher


def _read(text: str, size: int, end_tokens: list[int]) -> LLTokenizer:
    try:
        return LLTokenizer(text, n_vocab=size, eos_token=end_tokens or None)
    except ValueError:
        # Some tokenizers have more tokens than the model has logits.
        return LLTokenizer(text, eos_token=end_tokens or None)


def _grammar(constraint: Constraint) -> str:
    match constraint.kind:
        case "json_schema":
            return _json(with_patterns(constraint.text))
        case "json_object":
            return _json('{"type": "object"}')
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in constraint.texts))


def _json(schema: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_STYLE)
    except ValueError as error:
        raise InvalidConstraint(f"The schema cannot be read: {_short(str(error))}.", param=PARAM) from error


def refusal(matcher: LLMatcher) -> InvalidConstraint:
    """Why a matcher gave up."""
    return InvalidConstraint(f"The constraint cannot be followed: {_short(matcher.get_error())}.", param=PARAM)


def _short(text: str) -> str:
    words = " ".join(text.replace("<non-verbose/>", "").split()).rstrip(".")
    return words if len(words) <= _MESSAGE_CHARS else f"{words[:_MESSAGE_CHARS]} ..."

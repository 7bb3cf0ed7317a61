"""A small byte-level vocabulary with some of the pieces that JSON is made of, and a special end token."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_PIECES = (
    '{"',
    '":',
    '",',
    ' "',
    '"}',
    '"]',
    '"},',
    "tr",
    "true",
    "nul",
    "null",
    "in",
    "name",
    " name",
    "aa",
    "the",
    " the",
)


@functools.cache
def tokenizer() -> Tokenizer:
    """The library's tokenizer of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate(alphabet)}
    merges = []
    for piece in _PIECES:
        letters = list(piece.replace(" ", "Ġ"))
        while len(letters) > 1:
            pair = (letters[0], letters[1])
            letters[:2] = ["".join(pair)]
            if letters[0] not in vocab:
                vocab[letters[0]] = len(vocab)
                merges.append(pair)
    found = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|other|>", special=True)])
    return found


SIZE = tokenizer().get_vocab_size() + 3
"""Width of the logits: some more than there are tokens, as in many models."""
END = tokenizer().token_to_id("<|end|>")
OTHER = tokenizer().token_to_id("<|other|>")


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    ids: list[int] = tokenizer().encode(text).ids
    return ids


def decode(tokens: list[int]) -> str:
    """Text of token ids, special ones left out."""
    text: str = tokenizer().decode(tokens)
    return text


def write(folder: Path) -> Path:
    """Put tokenizer.json into a model's folder."""
    definition = json.loads(tokenizer().to_str())
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder

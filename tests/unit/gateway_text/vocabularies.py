"""Small vocabularies of the kinds that models have."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = "<|im_end|>"


def byte_level() -> bytes:
    """Byte-level BPE: the 256 bytes, some merges, a special end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ã", "©")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(END, special=True)])
    inner.add_tokens(["two words"])
    return inner.to_str().encode()


def sentencepiece() -> bytes:
    """SentencePiece as Llama 2 has it: spaces as U+2581, bytes as fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "a", "b"]
    inner = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    return inner.to_str().encode()


def metaspace() -> bytes:
    """A vocabulary whose decoder looks at the place of a token, so that no table of bytes will do."""
    pieces = ["<unk>", "</s>", "▁Hello", "▁world", "wide", "▁", "!", "é"]
    inner = Tokenizer(models.WordLevel(vocab={piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["</s>"])
    return inner.to_str().encode()


def reference(definition: bytes) -> tokenizers.Tokenizer:
    """The library's own tokenizer."""
    return Tokenizer.from_str(definition.decode())


def size(definition: bytes) -> int:
    """Number of token ids."""
    return int(reference(definition).get_vocab_size())


def without_decoder(definition: bytes) -> bytes:
    """The same vocabulary with nothing said about decoding."""
    content: dict[str, Any] = json.loads(definition)
    content["decoder"] = None
    return json.dumps(content).encode()

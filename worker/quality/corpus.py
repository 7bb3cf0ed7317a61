"""A text to measure quality on: the standard library's documentation, as the running Python carries it."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer

WINDOWS = 3
WINDOW_TOKENS = 640
"""More than a sliding window of 512. Over three texts, the ratio of two perplexities is good to about 0.15 %."""
_CHARACTERS_PER_TOKEN = 6
"""Of English prose, at most."""


def windows(tokenizer: Path, count: int = WINDOWS, length: int = WINDOW_TOKENS) -> list[list[int]]:
    """The first `length` token ids of each of `count` articles, special tokens as the tokenizer.json adds them.

    The same for the same Python version and tokenizer.
    """
    encoder = Tokenizer.from_file(str(tokenizer))
    return [encoder.encode(text).ids[:length] for text in articles(count, length * _CHARACTERS_PER_TOKEN)]


def articles(count: int, characters: int) -> list[str]:
    """`count` texts of at least so many characters, spread evenly over the alphabet of their titles.

    Raises ValueError if there are fewer.
    """
    long = [text for _, text in sorted(topics.items()) if len(text) >= characters]
    if len(long) < count:
        raise ValueError(f"the standard library's documentation has {len(long)} articles of {characters} characters")
    return [long[number * len(long) // count] for number in range(count)]

"""Pieces of text as the tokens of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bitnet_triton.training.tasks.haystack import Haystack, documentation
from bitnet_triton.training.tasks.words import NAMES, NUMBERS


class TextTokens:
    """A tokenizer that remembers the pieces it has encoded.

    Args:
        tokenizer: of transformers.
        held_out: whether text comes from the files that no model here was trained on.

    Attributes:
        start: what the tokenizer puts before a text.
        haystack: the text that facts are hidden in.
        per_word: tokens of the longest word.
    """

    def __init__(self, tokenizer: Any, *, held_out: bool = True) -> None:
        self.tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        plain, whole = self.encode(["a"]), tokenizer("a")["input_ids"]
        self.start = whole[: len(whole) - len(plain)] if whole[-len(plain) :] == plain else []
        text = documentation(held_out=held_out)
        self.haystack = Haystack(
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        )
        words = [*NAMES, *NUMBERS]
        self.per_word = max(len(self.encode([word])) for word in words)

    def encode(self, pieces: Iterable[str]) -> list[int]:
        """Return the tokens of pieces, each encoded for itself."""
        ids: list[int] = []
        for piece in pieces:
            if piece not in self._ids:
                encoded = self.tokenizer(piece, add_special_tokens=False)["input_ids"]
                self._ids[piece] = encoded
            ids += self._ids[piece]
        return ids

    def words(self, ids: Iterable[int]) -> list[str]:
        """Return the words that tokens say, each with the space before it."""
        return [f" {word}" for word in self.tokenizer.decode(list(ids)).split()]

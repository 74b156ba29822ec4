"""Words of a vocabulary: with a figure, and as a reader is shown them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Word:
    """A word of the vocabulary with a figure.

    Args:
        token_id: its row in the embedding table.
        text: as the tokenizer writes it; None without a tokenizer.
        value: what the list is sorted by: a cosine, or a shift.
    """

    token_id: int
    text: str | None
    value: float


def word_of(token_id: int, value: float, tokenizer: PreTrainedTokenizerBase | None) -> Word:
    """A word with its text, if there is a tokenizer."""
    return Word(token_id, None if tokenizer is None else tokenizer.decode([token_id]), value)


def shown(word: Word) -> str:
    """A word so that spaces and line ends are seen; its id where there is no tokenizer."""
    return f"#{word.token_id}" if word.text is None else repr(word.text)[1:-1].replace(" ", "␣") or "(empty)"


def printable(text: str) -> str:
    """A text of a file for a terminal, in one line: control characters, which a terminal obeys, as escapes."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)

"""Texts as token ids, a handful of texts at a time: what counting and measuring read from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

TEXTS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Tokens:
    """A text and its tokens, without those that the tokenizer puts around it.

    Args:
        number: the text's place in the stream, from 1.
        text: the text.
        ids: its tokens.
        context: how many of them are the first character's: the first token, and what else of the same character
            tokenizers that split characters into bytes put behind it. A language model has nothing to go by there.
        rest_bytes: UTF-8 bytes of the text behind that context.
    """

    number: int
    text: str
    ids: list[int]
    context: int
    rest_bytes: int


def token_stream(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    argument: str = "texts",
    texts_at_once: int | None = None,
) -> Iterator[list[Tokens]]:
    """Reads texts in groups that are small in number and in characters; one long text is a group of its own.

    Raises:
        ValueError: `texts` is one string, or something in it is no text that can be written as UTF-8; or the tokenizer
            does not say where its tokens stand in the text (only those of the `tokenizers` library do).
    """
    if isinstance(texts, str):
        raise ValueError(f"`{argument}` is one string. Pass an iterable of texts, for example [{texts[:20]!r}].")
    group: list[tuple[int, str]] = []
    characters = 0
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ValueError(f"`{argument}`: text {number} is {text!r:.60}, not a string. Pass an iterable of texts.")
        if group and (len(group) == (texts_at_once or TEXTS_AT_ONCE) or characters + len(text) > CHARACTERS_AT_ONCE):
            yield _encoded(group, tokenizer, argument)
            group, characters = [], 0
        group.append((number, text))
        characters += len(text)
    if group:
        yield _encoded(group, tokenizer, argument)


def _encoded(group: list[tuple[int, str]], tokenizer: PreTrainedTokenizerBase, argument: str) -> list[Tokens]:
    for number, text in group:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"`{argument}`: text {number} is no valid Unicode ({error}). Repair it.") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"`tokenizer` is a {type(tokenizer).__name__}, which does not say where its tokens stand in the text. "
            "Pass one of the tokenizers library (`tokenizer.is_fast`)."
        )
    encoded = tokenizer(
        [text for _, text in group],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,  # a text may be longer than the model's window
    )
    rows = zip(group, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [_tokens(number, text, ids, offsets) for (number, text), ids, offsets in rows]


def _tokens(number: int, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    if not ids:
        return Tokens(number, text, ids, 0, 0)
    end = offsets[0][1]
    context = next((i for i, (start, _) in enumerate(offsets) if i and start >= end), len(ids))
    return Tokens(number, text, ids, context, len(text[end:].encode()))


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a text by itself: usually a start token or nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for i in range(len(full) - len(plain) + 1):
        if full[i : i + len(plain)] == plain:
            return full[:i]
    return []


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A figure that two tokenizers share if they have the same tokens under the same ids."""
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()

"""The words that virtual tokens stand on: ids of the table that no text can have.

In this order: the words that `grow_base` has added; rows behind the tokenizer's last word (tables are often rounded
up); words that the tokenizer itself calls reserved or unused and the chat template does not use. An adapter with fewer
virtual tokens takes the first of those that one with more takes, so that adapters share a base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..export.tokenizer import VIRTUAL_TOKEN, add_words, map_template, plain_copy, put_in_front

_RESERVED = re.compile(r"[<\[]\|?(reserved|unused)\w*\|?[>\]]")  # Llama 3's, Gemma's, BERT's
_ID_FIELD = re.compile(r"(^|_)token_(id|ids|index|indices)$")
LOOP = "{#- virtual tokens -#}"  # the part of a grown base's chat template that puts `virtual_tokens` words in front


@dataclass(frozen=True)
class Places:
    """Where virtual tokens stand.

    Args:
        ids: of the table, in order.
        tokenizer: one that puts them in front; None if none was given.
        front: what it puts there, as text.
    """

    ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerFast | None = None
    front: str | None = None


def find_places(
    count: int,
    rows: int,
    configs: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    named: Sequence[int] | None = None,
) -> Places:
    """Finds a word for each virtual token.

    Args:
        count: number of virtual tokens.
        rows: of the embedding table.
        configs: the model's configurations; ids that they or the tokenizer name (padding, images, end) are taken.
        tokenizer: the base model's.
        named: ids of the caller's choice.

    Raises:
        ValueError: there are too few, or the named ones cannot be used; the message says what to do.
    """
    taken = {id for config in configs for id in _ids_in(config.to_dict())}
    if tokenizer is not None:
        taken |= _named_in(tokenizer)
    if named is not None:
        _check_named(named, count, rows, taken)
    if tokenizer is None:
        if count and named is None:
            raise ValueError(
                f"`tokenizer` is None, so nothing tells which ids are free for the {count} virtual tokens. Pass the "
                "base model's tokenizer, or the ids as `virtual_token_ids`."
            )
        return Places(tuple(named or ()))
    own = plain_copy(tokenizer)
    own.chat_template = map_template(own.chat_template, without_loop)
    words = _named_words(own, named) if named is not None else _free_words(own, count, rows, taken)
    return Places(tuple(put_in_front(own, words)), own, "".join(words))


def _named_in(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the words that a tokenizer uses itself: padding, beginning, end."""
    words = [word for word in tokenizer.special_tokens_map.values() if isinstance(word, str)]  # lists are of others
    return set(tokenizer.convert_tokens_to_ids(words))


def without_loop(template: str) -> str:
    """A chat template without what `grow_base` has put before it."""
    return template.rpartition(LOOP)[2]


def _free_words(own: PreTrainedTokenizerFast, count: int, rows: int, taken: set[int]) -> list[str]:
    vocabulary = own.get_vocab()
    virtual = [VIRTUAL_TOKEN.format(i) for i in range(count)]
    if not count or all(vocabulary.get(word, rows) < rows for word in virtual):
        return virtual
    if virtual[0] in vocabulary:
        there = sum(word in vocabulary for word in virtual)
        raise ValueError(
            f"The base model has words for {there} virtual tokens, and this adapter has {count}. Grow the base once "
            f"for the longest of its adapters, grow_base(base, output_dir, virtual_tokens={count}) or "
            f"`peft-input-tuning grow-base BASE OUTPUT --virtual-tokens {count}`."
        )
    known = set(vocabulary.values())
    ids = add_words(plain_copy(own), virtual)
    if max(ids) < rows and taken.isdisjoint(ids) and known.isdisjoint(ids):
        return virtual
    reserved = reserved_words(own, rows, taken)
    if len(reserved) >= count:
        return reserved[:count]
    behind = max(0, rows - min(ids))
    raise ValueError(
        f"The embedding table has no words to spare for {count} virtual tokens: of its {rows} rows {behind} are "
        f"behind the tokenizer's last word, and {len(reserved)} are words that the tokenizer calls reserved or "
        f"unused. Add words once for all adapters of this base, grow_base(base, output_dir, virtual_tokens={count}) "
        f"or `peft-input-tuning grow-base BASE OUTPUT --virtual-tokens {count}`, and load the adapter on the result; "
        "or name ids that no text has as `virtual_token_ids`."
    )


def reserved_words(tokenizer: PreTrainedTokenizerBase, rows: int, taken: set[int]) -> list[str]:
    """Words that are called reserved or unused, the last one first: people who use some begin with the first."""
    templates = tokenizer.chat_template
    used = " ".join(templates.values()) if isinstance(templates, dict) else templates or ""
    found = {id: word for word, id in tokenizer.get_vocab().items() if _RESERVED.fullmatch(word)}
    return [found[id] for id in sorted(found, reverse=True) if id < rows and id not in taken and found[id] not in used]


def _named_words(own: PreTrainedTokenizerFast, named: Sequence[int]) -> list[str]:
    """The words of ids; those without one get one, which a tokenizer gives to the ids behind its last word only."""
    words = {id: word for word, id in own.get_vocab().items()}
    new = [id for id in named if id not in words]
    names = [VIRTUAL_TOKEN.format(i) for i in range(len(new))]
    got = add_words(plain_copy(own), names) if new else []
    if got != new:
        raise ValueError(
            f"`virtual_token_ids` names {new}, for which the tokenizer has no words, and it gives new words the ids "
            f"{got}. Name those, or words that it has, or pass no tokenizer."
        )
    return [words.get(id) or names[new.index(id)] for id in named]


def _check_named(named: Sequence[int], count: int, rows: int, taken: set[int]) -> None:
    ids = list(named)
    if len(ids) != count or len(set(ids)) != count:
        raise ValueError(
            f"`virtual_token_ids` has {len(set(ids))} different ids, and the adapter has {count} virtual tokens. Name "
            "one for each."
        )
    wrong = [id for id in ids if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < rows or id in taken]
    if wrong:
        raise ValueError(
            f"`virtual_token_ids` names {wrong[0]!r}, which is no row of the table (0 to {rows - 1}), or which the "
            "model's configuration or the tokenizer uses (padding, end). Name an id that no text has."
        )


def _ids_in(value: Any, field: str = "") -> Iterator[int]:
    """Ids that a configuration names, those of configurations inside of it too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _ids_in(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _ids_in(inner, field)
    elif _ID_FIELD.search(field) and isinstance(value, int):
        yield value

"""The tokenizer of an exported model: virtual tokens are special tokens that it puts in front by itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

VIRTUAL_TOKEN = "<|virtual_{}|>"
_KEPT = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names")


def tokenizer_with_prompt(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A copy of a tokenizer that starts every input with `count` virtual tokens; the one passed in is not changed.

    It is a plain `PreTrainedTokenizerFast`: classes such as T5Tokenizer build their own post-processor when they are
    loaded, and `add_bos_token` would replace ours.

    Args:
        tokenizer: a tokenizer with a `backend_tokenizer` (a "fast" one).
        count: number of virtual tokens.

    Returns:
        The tokenizer, and the ids of the virtual tokens in order.

    Raises:
        ValueError: a tokenizer without a backend, or with tokens of these names.
    """
    names = [VIRTUAL_TOKEN.format(i) for i in range(count)]
    known = set(names) & set(tokenizer.get_vocab())
    if known:
        raise ValueError(
            f"`tokenizer` has the token {min(known)!r} already. It is an exported model's: pass the base model's."
        )
    exported = plain_copy(tokenizer)
    return exported, put_in_front(exported, names)


def plain_copy(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """A copy as a plain `PreTrainedTokenizerFast`, without padding and truncation.

    Raises:
        ValueError: a tokenizer without a backend.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"`tokenizer` is a {type(tokenizer).__name__} without a `tokenizers` backend, which cannot put virtual "
            "tokens in front by itself. Pass the fast tokenizer of the model, or none."
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    settings: dict[str, Any] = {name: getattr(tokenizer, name) for name in _KEPT if hasattr(tokenizer, name)}
    copied = PreTrainedTokenizerFast(tokenizer_object=backend, **special, **settings)
    extra = [str(t) for t in getattr(tokenizer, "extra_special_tokens", None) or [] if isinstance(t, str)]
    copied.add_tokens(extra, special_tokens=True)
    copied.chat_template = copy.copy(tokenizer.chat_template)
    return copied


def add_words(tokenizer: PreTrainedTokenizerFast, names: list[str]) -> list[int]:
    """Makes `names` special tokens; those that the tokenizer knows keep their ids. Returns their ids."""
    tokenizer.add_tokens(names, special_tokens=True)
    return tokenizer.convert_tokens_to_ids(names)


def put_in_front(tokenizer: PreTrainedTokenizerFast, names: list[str]) -> list[int]:
    """Makes `names` special tokens that start every text and every chat, in place. Returns their ids."""
    ids = add_words(tokenizer, names)
    if names:
        _put_in_front(tokenizer.backend_tokenizer, names, ids)
        tokenizer.chat_template = map_template(
            tokenizer.chat_template, lambda template: f"{{{{- {json.dumps(''.join(names))} }}}}{template}"
        )
    return ids


def _put_in_front(backend: Tokenizer, names: list[str], ids: list[int]) -> None:
    """After whatever the tokenizer adds by itself (a start token): the prompt stands before that."""
    front = " ".join(names)
    prompt = processors.TemplateProcessing(
        single=f"{front} $A", pair=f"{front} $A $B:1", special_tokens=list(zip(names, ids, strict=True))
    )
    own = backend.post_processor
    backend.post_processor = prompt if own is None else processors.Sequence([own, prompt])


def map_template(template: Any, change: Callable[[str], str]) -> Any:
    """Changes a chat template, or each of several; None stays None.

    Chat templates render to text that is tokenized without special tokens, so virtual tokens go into the text.
    """
    if isinstance(template, dict):
        return {name: map_template(one, change) for name, one in template.items()}
    return None if template is None else change(template)

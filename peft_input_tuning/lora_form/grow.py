"""A base model with words for virtual tokens, once for all of its adapters.

The words stand behind the tokenizer's last one. The tokenizer puts none of them in front by itself, since adapters
have prompts of different lengths, or the base has none: the chat template does, for `virtual_tokens=N`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..base_weights import is_quantized
from ..export.plain_model import empty_model, suppress, vocabulary_names
from ..export.state import grow_vocabulary
from ..export.tokenizer import VIRTUAL_TOKEN, add_words, map_template, plain_copy
from ..output.folders import unfinished_folder
from ..virtual_tokens.backbone import find_embedding
from .places import LOOP


@dataclass(frozen=True)
class GrownBase:
    """What `grow_base` wrote.

    Args:
        output_dir: the folder.
        virtual_token_ids: the new words, in order; an adapter with N virtual tokens takes the first N.
        rows: of the embedding table.
    """

    output_dir: Path
    virtual_token_ids: tuple[int, ...]
    rows: int


def grow_base(
    base: nn.Module,
    output_dir: str | Path,
    virtual_tokens: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    untie: bool = False,
) -> GrownBase:
    """Writes a base model with `virtual_tokens` more words, which LoRAs of `save_as_lora` put their prompts on.

    Its own outputs stay as they are. Rows of the table that are behind the tokenizer's last word are used first.

    Args:
        base: a model of transformers without adapters. It is not changed.
        output_dir: a folder that does not exist, or is empty.
        virtual_tokens: length of the longest prompt; 0 to untie only.
        tokenizer: the base model's; None writes none, and takes every row of the table for a word.
        untie: gives the embedding a table of its own, apart from the output head's (and from the decoder's): llama.cpp
            and `merge_and_unload` of PEFT need that.

    Raises:
        ValueError: a model with adapters, a quantized one, or a target that is in use.
    """
    _check(base, virtual_tokens)
    path = find_embedding(base)
    words = base.get_submodule(path).num_embeddings
    own, ids = None, list(range(words, words + virtual_tokens))
    if tokenizer is not None:
        own, ids = _with_words(tokenizer, virtual_tokens)
    rows = max([words, *(id + 1 for id in ids)])
    if untie and not ids and base.config.is_encoder_decoder:
        raise ValueError(
            "`untie` needs `virtual_tokens` >= 1 on an encoder-decoder model: without new words the two tables are "
            "equal, and loading would tie them again. Grow the original base with `untie` and its words at once."
        )
    with unfinished_folder("`output_dir`", output_dir, last="config.json") as folder:
        state = dict(base.state_dict())
        _grow(base, state, f"{path}.weight", rows, ids, untie)
        grown = empty_model(base, rows, untie=untie)
        if grown.can_generate() and ids:
            suppress(grown.generation_config, ids)
        grown.to(base.dtype).save_pretrained(folder, state_dict=state)
        if own is not None:
            own.save_pretrained(folder)
    return GrownBase(Path(output_dir), tuple(ids), rows)


def _check(base: nn.Module, virtual_tokens: int) -> None:
    if isinstance(virtual_tokens, bool) or not isinstance(virtual_tokens, int) or virtual_tokens < 0:
        raise ValueError(f"`virtual_tokens` must be an integer >= 0, got {virtual_tokens!r}.")
    if hasattr(base, "get_base_model") or any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError(
            "`base` has adapters. Load the base model by itself, grow it, and load adapters on the result."
        )
    if any(weight.is_meta or is_quantized(weight) for weight in base.parameters()):
        raise ValueError("`base` is quantized or offloaded. Load it in its own dtype on one device, and grow that.")


def _grow(
    base: nn.Module, state: dict[str, Tensor], table_name: str, rows: int, ids: Sequence[int], untie: bool
) -> None:
    """Gives the tensors of the state dict their new rows. A table that the head shares gets zeros, whose logits are
    zero; one of its own gets the mean of its words, as resizing in transformers does. (Two equal tables in a file
    would be tied again when it is loaded.)"""
    table = state[table_name]
    others = vocabulary_names(base, state, table_name)
    shared = [name for name in others if state[name].data_ptr() == table.data_ptr()]
    words = table.shape[0]
    grow_vocabulary(state, others if untie or not shared else [table_name, *others], rows, ids)
    if shared and not untie:
        return
    new = table.new_zeros(rows, table.shape[1])
    new[:words] = table
    new[list(ids)] = table.float().mean(0).to(table.dtype)
    state[table_name] = new


def _with_words(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[PreTrainedTokenizerFast, list[int]]:
    names = [VIRTUAL_TOKEN.format(i) for i in range(count)]
    known = set(names) & set(tokenizer.get_vocab())
    if known:
        raise ValueError(f"`tokenizer` has the token {min(known)!r} already. Grow the base model that it came from.")
    own = plain_copy(tokenizer)
    ids = add_words(own, names)
    if names:  # or a base that was grown before keeps what its template says of its words
        own.chat_template = map_template(own.chat_template, lambda template: _loop(names) + template)
    return own, ids


def _loop(names: Sequence[str]) -> str:
    """Words before a chat template: none, unless it is called with `virtual_tokens=N`."""
    return (
        "{%- set virtual_tokens = virtual_tokens | default(0) -%}"
        f"{{%- if virtual_tokens > {len(names)} -%}}"
        f'{{{{- raise_exception("virtual_tokens is more than the {len(names)} that this base model has") -}}}}'
        "{%- endif -%}"
        f"{{%- for word in {json.dumps(list(names))}[:virtual_tokens] -%}}{{{{- word -}}}}{{%- endfor -%}}{LOOP}"
    )

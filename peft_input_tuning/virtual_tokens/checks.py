"""What a call cannot do, said by name before anything runs. Every function returns, or raises a ValueError."""

from __future__ import annotations

import operator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import BackboneTraits
from .cache_mark import has_fixed_size, of_tokens, places_in
from .call import BackboneCall

IGNORED = -100  # the label of a token that has none, in all of transformers
# What virtual tokens get in arguments that have something for each place of the input.
FILLS = {
    "labels": IGNORED,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,  # text
    "moe_mm_token_type_ids": 0,
    "image_attention_mask": 0,  # images that a place sees (Idefics): none, as a word in front of them
    "cross_attention_mask": 0,  # the same (Mllama)
    "image_embeds_position_mask": 0,  # whether it is an image's place (Kosmos-2)
    "bbox": 0,  # where it stands on a page (UDOP): nowhere
    "global_attention_mask": 0,  # whether it sees all, and all see it (Longformer, LED): as other words
    "langs": None,  # what the row's first token has (XLM)
}
_OF_HEADS = ("shift_labels",)  # of losses, which get the output without virtual tokens
_OF_PLACES = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", *_OF_HEADS, *FILLS)


def check_one_input(call: dict[str, Any], backbone: nn.Module, traits: BackboneTraits) -> None:
    """Both ids and embeddings, or embeddings where they do not do what their ids do."""
    name = type(backbone).__name__
    if call.get("inputs_embeds") is None:
        if traits.embedding is None:
            raise ValueError(
                f"{name} got `input_ids`, but the input-adapter is in the model around it, which looks ids up. Call "
                "that model, or pass `inputs_embeds`."
            )
        return
    if call.get("input_ids") is not None:
        raise ValueError(
            f"{name} got `input_ids` and `inputs_embeds`, and virtual tokens would stand in one of them. Pass one of "
            "them, or use num_virtual_tokens=0."
        )
    if traits.takes_embeddings is False:
        raise ValueError(
            f"{name} does more with ids than look up their embeddings (it may scale them), so a prompt in front of "
            "`inputs_embeds` would not be what it is in front of ids. Pass `input_ids`, or use num_virtual_tokens=0."
        )


def check_no_embeddings(call: dict[str, Any]) -> None:
    """Of a call with `adapter_names`."""
    if call.get("inputs_embeds") is not None:
        raise ValueError(
            "`inputs_embeds` beside `adapter_names` were looked up before it was known which adapter each row has. "
            "Pass `input_ids`, or a batch for each adapter."
        )


def check_mask_and_positions(call: dict[str, Any], given: Tensor) -> None:
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if call.get("input_ids") is not None and given.ndim != 2:
        raise ValueError(
            f"`input_ids` must have the shape (batch, length), got {tuple(given.shape)}. Make choices rows of the "
            "batch, `input_ids.flatten(0, 1)`, and what goes with them likewise."
        )
    check_not_expanded(mask)
    if mask is not None and mask.shape[1] != given.shape[1]:
        raise ValueError(
            f"`attention_mask` has {mask.shape[1]} places for an input of {given.shape[1]} tokens. Pass a mask of the "
            "input's length; virtual tokens are added to it."
        )
    if positions is not None and positions.ndim not in (2, 3):
        raise ValueError(
            f"`position_ids` must have the shape (batch, length) or (axes, batch, length), got "
            f"{tuple(positions.shape)}."
        )


def check_room(cache: Any, places: int) -> None:
    """A cache of a fixed size must hold the virtual tokens, too."""
    own = of_tokens(cache)
    if not has_fixed_size(cache) or all(map(operator.or_, own.is_sliding, own.is_linear)):
        return  # what has no room is forgotten
    room = cache.get_max_length()
    if 0 <= room < places:
        raise ValueError(
            f"The cache is a {type(cache).__name__} of {room} places, and the tokens and virtual tokens take "
            f"{places}. Make it larger by the number of virtual tokens, or let `generate` make it."
        )


def check_mark_was_not_lost(call: dict[str, Any], cache: Any, length: int, slots: int) -> None:
    """A cache without a mark was filled without a prompt, or made anew of the tensors of one that was not."""
    mask, places = call.get("attention_mask"), places_in(cache)
    if (
        isinstance(mask, Tensor)
        and mask.ndim == 2
        and isinstance(places, int)
        and mask.shape[1] + slots == places + length
    ):
        raise ValueError(
            f"The cache holds {places} places, and `attention_mask` has {mask.shape[1]} for them and {length} new "
            f"tokens: {slots} less, the virtual tokens. The cache was made anew, and does not say that it holds them. "
            "Go on with the cache that the model returned, or a copy of it (copy.deepcopy)."
        )


def check_can_be_packed(backbone: nn.Module, call: dict[str, Any], traits: BackboneTraits) -> None:
    """For a call whose rows hold several sequences each."""
    name = type(backbone).__name__
    packed = "several sequences are packed into a row"
    if not traits.is_causal or "position_ids" not in traits.parameters:
        raise ValueError(
            f"{packed}, which {name} cannot tell apart. Pass one sequence a row, with padding (no packing, no "
            "padding_free)."
        )
    batch = call["input_ids"].shape[0] if call.get("inputs_embeds") is None else call["inputs_embeds"].shape[0]
    if batch > 1 and "flash" in str(backbone.config._attn_implementation):
        raise ValueError(
            f"{packed}, in a batch of {batch} rows. With flash attention {name} tells packed sequences apart in a "
            "batch of one row only: flatten the batch into one row."
        )


def check_positions_can_be_read() -> None:
    """Compiled code cannot look at positions that come with neither a mask nor a cache, where they may be of packed
    rows."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "`position_ids` come without an `attention_mask` or a cache, which may mean that several sequences are "
            "packed into a row, and a compiled model cannot look. Pass an `attention_mask` with one sequence a row, "
            "pass `cu_seq_lens_q` of packed rows (DataCollatorWithFlattening(return_flash_attn_kwargs=True)), or do "
            "not compile."
        )


def check_sequences_can_be_told(call: dict[str, Any]) -> None:
    """`seq_idx` is for the state-space layers of a hybrid; its attention reads positions or bounds."""
    others = ("position_ids", "cu_seq_lens_q", "attention_mask")
    if call.get("seq_idx") is not None and all(call.get(name) is None for name in others):
        raise ValueError(
            "`seq_idx` came alone, and prompts are put before the sequences that positions or bounds tell. Pass "
            "`position_ids` that restart with each sequence, or `cu_seq_lens_q`, beside it."
        )


def check_not_expanded(mask: Any) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"`attention_mask` must have the shape (batch, length), got {shape}: virtual tokens cannot be added to "
            "a mask that is already expanded. Pass the two-dimensional mask. Where `generate` of a model around the "
            "adapted one makes it, for a static cache: use a dynamic cache, or give the whole model the adapter."
        )


def check_other_arguments(backbone: nn.Module, call: dict[str, Any], given: Tensor) -> None:
    """Arguments with a value for each place of the input, of which only some are known here (not XLNet's
    `perm_mask`), and XLM's lengths of rows."""
    for name, value in call.items():
        if name in _OF_PLACES or name.startswith("encoder_") or not isinstance(value, Tensor):
            continue
        is_of_places = value.shape[:2] == given.shape[:2] and not name.startswith("pixel_values")
        if name == "lengths" or is_of_places:
            raise ValueError(
                f"`{name}` has the shape {tuple(value.shape)}, and nothing is known of what {type(backbone).__name__} "
                "does with it, so it gets none for virtual tokens. Leave it out, or use num_virtual_tokens=0."
            )


def check_all_places_came_back(backbone: nn.Module, places: int, expected: int) -> None:
    if places != expected:
        raise ValueError(
            f"{type(backbone).__name__} gives {places} places for {expected}: it pools its input, or adds to it, so "
            "virtual tokens cannot be taken out again. Use num_virtual_tokens=0."
        )


def check_cache_is_filled(call: BackboneCall, output: Any) -> None:
    """XLM is given whole rows with a cache, and cuts them by its length."""
    name = call.traits.cache
    if call.cache is None or call.traits.fills_cache or name in {field.name for field in fields(output)}:
        return
    raise ValueError(
        f"`{name}` was passed to {type(call.backbone).__name__}, which does not return it: nothing tells how it goes "
        "on. Pass use_cache=False, or use num_virtual_tokens=0."
    )


def check_output_is_known(backbone: nn.Module, name: str, value: Tensor, places: tuple[int, int]) -> None:
    """An output with something for each place, of which nothing is known (ProphetNet's stream of n-grams)."""
    if value.shape[0] == places[0] and value.shape[1] % places[1] == 0:
        raise ValueError(
            f"{type(backbone).__name__} puts out `{name}`, {tuple(value.shape)}, of which nothing is known: virtual "
            "tokens would stay in it. Use num_virtual_tokens=0."
        )


def check_mixed_lengths(call: BackboneCall) -> None:
    """Rows of one call have prompts of different lengths."""
    traits, name = call.traits, type(call.backbone).__name__
    if traits.needs_token_types and call.arguments.get("token_type_ids") is None:
        raise ValueError(
            f"`adapter_names`: without `token_type_ids` {name} attends in another way if something is masked, so "
            "adapters with prompts of different lengths cannot share a batch. Pass them, as the processor gives them, "
            "or use one batch for each length."
        )
    if traits.honours_mask is False:
        raise ValueError(
            f"`adapter_names`: {name} was not seen to leave out what is masked, so adapters with "
            "prompts of different lengths cannot share a batch. Use adapters of one length, or one batch each."
        )
    later = call.cache is not None or (traits.cache is not None and call.makes_cache)
    if traits.slack == "right" and later:
        raise ValueError(
            f"`adapter_names`: {name} numbers positions by place in the row, the same for all rows, so adapters "
            "with prompts of different lengths cannot share a batch that later tokens follow. Use adapters of one "
            "length, one batch each, or use_cache=False."
        )


def check_masks_on_cache(model: object, mask: Tensor | None, lengths: Any) -> None:
    """For a `generate` of a model that reads masks otherwise once there is a cache; looked at once, at its start."""
    if len(set(lengths)) > 1 or (mask is not None and not bool(mask.all())):
        raise ValueError(
            f"`attention_mask` has masked places, or prompts have different lengths, and on a cache what is masked "
            f"counts in {type(model).__name__}. Pass use_cache=False, or rows of one length without padding."
        )


def check_not_too_long(call: dict[str, Any], total: int, slots: int, traits: BackboneTraits) -> None:
    """`total` places are more than the table of positions has. Pads may share a position: only of calls that would be
    refused otherwise is the data looked at."""
    if traits.max_positions is None or total <= traits.max_positions:
        return
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    if not torch.compiler.is_compiling():
        if positions is not None and int(positions.max()) - traits.first_position < traits.max_positions:
            return
        tokens = mask.sum(dim=-1) if isinstance(mask, Tensor) and traits.positions_from_mask else None
        if positions is None and tokens is not None and int(tokens.max()) <= traits.max_positions:
            return
    raise ValueError(
        f"The input has {total - slots} tokens and the prompt {slots} virtual tokens, together {total}, but the model "
        f"has only {traits.max_positions} positions. Shorten the input to {traits.max_positions - slots} tokens, or "
        "use a smaller `num_virtual_tokens`."
    )


def check_mask_length(mask: Tensor, past: int, length: int) -> None:
    """`length` new tokens on a cache that holds `past` tokens and a prompt."""
    if mask.shape[1] != past + length:
        raise ValueError(
            f"`attention_mask` has {mask.shape[1]} places, but the cache holds {past} tokens and {length} more are "
            "passed. Pass a mask over the cached and the new tokens together, without the virtual tokens."
        )


def check_no_pads_behind_prompt(left_pads: Tensor, before_prompt: Tensor | int) -> None:
    """A first chunk of nothing but pads got its prompt before all of the row's pads were there. Masks and positions
    make up for that, a window that counts places does not."""
    if (left_pads > before_prompt).any():
        raise ValueError(
            "`prefill_chunk_size` is smaller than the left padding of a row, and this model's attention has a sliding "
            "window, which would lose the prompt. Use larger chunks, or batch rows of similar length."
        )

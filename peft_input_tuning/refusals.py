"""What a call cannot do, said by name before anything runs. Every function returns, or raises a ValueError."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .cache_mark import MARK_ON_CACHE, CacheMark
from .splice import PromptLayout, count_left_pads

FLASH_KWARGS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
CONTINUE = (
    "To continue on a returned cache, pass only the new tokens as `input_ids`, and an `attention_mask` over the "
    "cached and the new tokens together: given all ids, `generate` would cut them by the length of the cache, which "
    "counts the virtual tokens too. An assistant model is called that way: its adapter must have num_virtual_tokens=0."
)


def refuse_what_cannot_be_spliced(call: dict[str, Any], cache: Any) -> None:
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"`past_key_values` is a {type(cache).__name__} of fixed size, which has no room for the virtual tokens. "
            "Call `generate` of the PeftModel (with a task type), which makes room, or use a dynamic cache."
        )
    refuse_expanded_mask(mask)
    given = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if mask is not None and given is not None and mask.shape[1] != given.shape[1]:
        raise ValueError(
            f"`attention_mask` has {mask.shape[1]} places for an input of {given.shape[1]} tokens. Pass a mask of the "
            "input's length; virtual tokens are added to it."
        )
    packed = [name for name in FLASH_KWARGS if call.get(name) is not None]
    if packed:
        raise ValueError(
            f"`{packed[0]}` says that several sequences are packed into one row, which is not supported: only the "
            "first would get the prompt. Pass one sequence a row, with padding."
        )
    if positions is not None:
        refuse_positions(positions, mask)


def refuse_expanded_mask(mask: Any) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"`attention_mask` must have the shape (batch, length), got {shape}: virtual tokens cannot be added to "
            "a mask that is already expanded. Pass the two-dimensional mask."
        )


def refuse_positions(positions: Tensor, mask: Tensor | None) -> None:
    if positions.ndim != 2:
        raise ValueError(f"`position_ids` must have the shape (batch, length), got {tuple(positions.shape)}.")
    if torch.compiler.is_compiling():
        return  # a look at the values would break the graph
    restarts = positions.diff(dim=-1) <= 0
    if mask is not None and mask.shape[-1] == positions.shape[-1]:
        restarts = restarts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if restarts.any():
        raise ValueError(
            "`position_ids` restart inside a row: several sequences are packed into it, which is not supported, since "
            "only the first would get the prompt. Pass one sequence a row, with padding (no packing, no padding_free)."
        )


def refuse_mixed_lengths(backbone: nn.Module, site: Backbone) -> None:
    if site.slack == "right" and "past_key_values" in site.parameters:
        raise ValueError(
            f"`adapter_names`: {type(backbone).__name__} numbers positions by place in the row, so adapters with "
            "prompts of different lengths cannot share a batch. Use adapters of one length, or one batch each."
        )


def refuse_too_long(call: dict[str, Any], total: int, slots: int, site: Backbone) -> None:
    """`total` places are more than the table of positions has; pads may share a position, so look closer then."""
    if site.max_positions is None or total <= site.max_positions:
        return
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    if not torch.compiler.is_compiling():
        if positions is not None and int(positions.max()) - site.first_position < site.max_positions:
            return
        tokens = mask.sum(dim=-1) if isinstance(mask, Tensor) and site.positions_from_mask else None
        if positions is None and tokens is not None and int(tokens.max()) <= site.max_positions:
            return
    raise ValueError(
        f"The input has {total - slots} tokens and the prompt {slots} virtual tokens, together {total}, but the model "
        f"has only {site.max_positions} positions. Shorten the input to {site.max_positions - slots} tokens, or use a "
        "smaller `num_virtual_tokens`."
    )


def refuse_full_ids(cache: Any, mask_length: int | None, length: int) -> None:
    """`mask_length` places of mask for `length` new tokens on a cache that holds a prompt."""
    slots = getattr(cache, MARK_ON_CACHE).layout.slots
    past = cache.get_seq_length() - slots
    if mask_length != past + length:
        got = "is missing" if mask_length is None else f"has {mask_length} places"
        raise ValueError(
            f"`attention_mask` {got}, but the cache holds {past} tokens (and {slots} virtual ones) and {length} more "
            f"are passed. {CONTINUE}"
        )


def refuse_pads_behind_prompt(mask: Tensor, layout: PromptLayout) -> None:
    """A first chunk of nothing but pads got its prompt before all of the row's pads were there. Masks and positions
    make up for that, a window that counts places does not."""
    if layout.pads is not None and (count_left_pads(mask) > layout.pads).any():
        raise ValueError(
            "`prefill_chunk_size` is smaller than the left padding of a row, and this model's attention has a sliding "
            "window, which would lose the prompt. Use larger chunks, or batch rows of similar length."
        )


def refuse_gap(positions: Tensor, past: int, length: int, mark: CacheMark) -> None:
    """Without a mask the positions tell whether the new tokens follow the cached ones."""
    if torch.compiler.is_compiling():
        return
    first = 0 if mark.first_position is None else mark.first_position
    message = f"`position_ids` do not go on where the cache ends, at {past} tokens. {CONTINUE}"
    follows = (positions[:, :1] == first + past).all()
    if length == 1 and positions.is_cuda:
        torch._assert_async(follows, message)  # a step of decoding, where waiting for the answer would cost time
    elif not follows:
        raise ValueError(message)

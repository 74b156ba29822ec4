"""A sequence goes on: the cache holds the prompt, and only the mask and the positions have to know of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..call_state import generation_of
from .cache_mark import CacheMark, MarkedTensors, places_in
from .call import BackboneCall
from .checks import (
    check_mask_length,
    check_mixed_lengths,
    check_no_pads_behind_prompt,
    check_not_expanded,
    check_not_too_long,
)
from .layout import PromptLayout, count_left_pads, repeat_rows


def go_on(call: BackboneCall, mark: CacheMark) -> None:
    """Rewrites a call on a cache with a mark."""
    arguments, traits, new = call.arguments, call.traits, call.given
    if new is None:
        return
    batch, length = new.shape[:2]
    layout = mark.layout.repeated(batch)
    check_not_expanded(arguments.get("attention_mask"))
    places = places_in(call.cache)
    past = None if places is None else places - layout.slots  # tokens: an int, or a tensor of caches of a fixed size
    if layout.lengths is not None:
        check_mixed_lengths(call)
        if traits.position_table is not None and past is not None:
            at = torch.arange(length, device=new.device) + past
            call.row_positions = layout.shift_positions(at.unsqueeze(0))
    _move_positions(call, layout, past, length)
    if isinstance(call.cache, MarkedTensors):  # masks are of new tokens (XLNet), and another list may come back
        call.mark = mark
        call.ask_for_names()
    else:
        _widen_mask(call, layout, mark, past, length)
    if isinstance(past, int):
        check_not_too_long(arguments, layout.slots + past + length, layout.slots, traits)


def _move_positions(call: BackboneCall, layout: PromptLayout, past: Any, length: int) -> None:
    arguments, traits = call.arguments, call.traits
    positions = arguments.get("position_ids")
    if positions is None:
        from_mask = traits.positions_from_mask and isinstance(past, int)  # else the mask is longer than what is there
        counts_places = "position_ids" in traits.parameters and not from_mask
        if layout.lengths is None or past is None or not counts_places:
            return
        positions = (torch.arange(length, device=layout.lengths.device) + past).unsqueeze(0) + traits.first_position
    arguments["position_ids"] = layout.shift_positions(positions)


def _widen_mask(call: BackboneCall, layout: PromptLayout, mark: CacheMark, past: Any, length: int) -> None:
    mask, batch = call.arguments.get("attention_mask"), call.given.shape[0]
    generation = generation_of(call.layer)
    if mask is None:
        if layout.lengths is None or past is None:  # a state has forgotten what was masked
            return
        # Of a cache of a fixed size, all that it has room for.
        total = past + length if isinstance(past, int) else call.cache.get_max_length() - layout.slots
        call.set_mask(layout.join_mask(None, batch, total))
        return
    if isinstance(past, int):
        check_mask_length(mask, past, length)
        # A chunk that the caller feeds by hand. `generate` looked at its own at the start; at a step nobody looks.
        by_hand = length > 1 and not torch.compiler.is_compiling() and generation is None
        before = layout.pads if by_hand and call.traits.has_window else None
        if before is not None:
            check_no_pads_behind_prompt(count_left_pads(mask), before)
    if generation is None or mark.mask is None:
        wide = layout.join_mask(mask, batch, mask.shape[1])
    elif generation.in_chunks:
        known = repeat_rows(mark.mask, batch)
        wide = torch.cat([known, mask[:, known.shape[1] - layout.slots :]], dim=1)
    else:  # `generate` appends ones only
        known = repeat_rows(mark.mask, batch)
        wide = nn.functional.pad(known, (0, layout.slots + mask.shape[1] - known.shape[1]), value=1)
    call.set_mask(wide)

"""A sequence starts: its prompt goes in front, as negative ids.

    ids    [ pads | a b c ]    ──►    [ pads | V-P … V-1 | a b c ]        V: `VIRTUAL`, far below 0

The embedding looks up V-1 as the last row of the prompt, V-2 as the one before it; whatever else the model does with
ids it does with these as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call_state import current_row_adapters, generation_of
from .cache_mark import CacheMark
from .call import BackboneCall
from .checks import (
    FILLS,
    check_mixed_lengths,
    check_not_too_long,
    check_other_arguments,
    check_room,
    check_sequences_can_be_told,
)
from .layout import PromptLayout

OF_PACKED_ROWS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def start(call: BackboneCall, slots: int) -> None:
    """Puts the prompts of a batch, at most `slots` long, in front of its rows."""
    arguments, traits, given = call.arguments, call.traits, call.given
    check_sequences_can_be_told(arguments)
    for name in OF_PACKED_ROWS:
        arguments.pop(name, None)  # a row is one sequence here: they say no more
    check_other_arguments(call.backbone, arguments, given)
    check_room(call.cache, slots + given.shape[1])
    call.tell_length_of_prefill(slots)
    batch, length, device = given.shape[0], given.shape[1], given.device
    mask = arguments.get("attention_mask")
    mask = None if mask is None else mask.to(device)
    rows = current_row_adapters(call.layer)
    layout = PromptLayout(
        slots,
        lengths=None if rows is None else rows.lengths_of(batch, device),
        mask=mask,
        slack=traits.slack,
    )
    if layout.lengths is not None:
        check_mixed_lengths(call)
        if traits.position_table is not None:
            call.row_positions = layout.join_positions(torch.arange(length, device=device).unsqueeze(0))
    positions, generation = arguments.get("position_ids"), generation_of(call.layer)
    by_generate = positions is not None and generation is not None and generation.makes_positions
    positions = _default_positions(call, layout) if positions is None else positions
    if positions is not None:
        arguments["position_ids"] = layout.join_positions(positions.to(device), by_generate)
    wide = layout.join_mask(mask, batch, length)
    call.set_mask(wide)
    check_not_too_long(arguments, slots + length, slots, traits)
    fill_places(arguments, layout, batch, device)
    virtual = layout.virtual_ids(batch, device, traits.padding_id)
    call.join_input(layout, virtual)
    call.layout, call.places = layout, slots + length
    call.mark = CacheMark(layout, None if mask is None else wide)
    call.ask_for_names()


def fill_places(arguments: dict[str, Any], layout: PromptLayout, batch: int, device: torch.device) -> None:
    """Gives virtual tokens a value in arguments that have one for each place, `(batch or 1, length, ...)`."""
    for name, fill in FILLS.items():
        value = arguments.get(name)
        if value is None:
            continue
        value = value.to(device)
        value = value if value.shape[0] == batch else value.expand(batch, *value.shape[1:])
        of_prompt = value.new_full((batch, layout.slots, *value.shape[2:]), fill or 0)
        if fill is None:
            of_prompt += value[:, :1] if layout.pads is None else value.gather(1, layout.pads)
        arguments[name] = layout.join(of_prompt, value)


def _default_positions(call: BackboneCall, layout: PromptLayout) -> Tensor | None:
    """The positions that the backbone would use, if it would not find them by itself any more: along embeddings
    RoBERTa counts all places, and slack moves the places of a mixed batch. None if it still finds them."""
    given, traits = call.given, call.traits
    if "position_ids" not in traits.parameters:
        return None
    if traits.padding_id is not None:
        if given.ndim == 2:
            return None
        return torch.arange(given.shape[1], device=given.device).expand(len(given), -1) + traits.first_position
    if layout.lengths is None or traits.positions_from_mask:
        return None
    return torch.arange(given.shape[1], device=layout.lengths.device).unsqueeze(0) + traits.first_position

"""Rewriting one call of the backbone: the prompt goes in where a sequence starts, and is counted in where it goes on.

a sequence starts      embeddings, mask, token types, positions  ──►  the same with virtual tokens
... at inference       the prompt's keys and values are known: they go into the cache (`prompt_cache.py`)
a sequence goes on     mask and positions  ──►  the same, knowing of the prompt in the cache
packed sequences       as where one starts, with a prompt before each (`PackedLayout`)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.masking_utils import create_masks_for_generate

from ..call_state import current_row_adapters, is_generating
from ..layer import InputTuningLayer
from .backbone import Backbone
from .cache_mark import CacheMark, cache_of, enter_backbone, mark_cache, places_in
from .layout import (
    PackedLayout,
    PromptLayout,
    count_left_pads,
    moved_bounds,
    positions_of,
    repeat_rows,
    sequence_starts,
)
from .prompt_cache import put_prompt_into_cache
from .refusals import (
    refuse_expanded_mask,
    refuse_left_pads,
    refuse_mask_of_other_length,
    refuse_mixed_lengths,
    refuse_other_places,
    refuse_pads_behind_prompt,
    refuse_positions_in_compiled_call,
    refuse_too_long,
)

OF_PACKED_ROWS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class SplicedCall(dict):
    """The kwargs of one call of the backbone, and what its post-hook has to undo."""

    layout: PromptLayout | PackedLayout | None = None  # of a call that put prompts in
    mark: CacheMark | None = None  # for the cache that the call fills
    as_tuple: bool = False  # the caller asked for return_dict=False


def given_input(call: dict[str, Any]) -> Any:
    """The ids or embeddings that the caller passed; None where there are none."""
    return call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]


def start_on_prompt_cache(
    backbone: nn.Module, call: SplicedCall, slots: int, layer: InputTuningLayer, site: Backbone
) -> bool:
    """The short way at inference: the prompt's keys and values are known, only the caller's tokens run."""
    given = given_input(call)
    cache = cache_of(call)
    one_given = (call.get("input_ids") is None) != (call.get("inputs_embeds") is None)
    if not one_given or site.slack == "right" or site.first_position:
        return False
    if site.max_positions is not None and slots + given.shape[1] > site.max_positions:
        return False
    layout = put_prompt_into_cache(backbone, call, given.shape[0], slots, layer, site.has_window)
    if layout is None:
        return False
    mark = CacheMark(layout)
    mark_cache(cache, mark)
    enter_backbone(cache)
    continue_after_prompt(call, cache, mark, layer, site)
    return True


def start_with_prompt(
    backbone: nn.Module, call: SplicedCall, slots: int, layer: InputTuningLayer, site: Backbone
) -> None:
    """Rewrites a call that starts a sequence: embeddings, mask, token types and positions get the virtual tokens."""
    ids, x = call.get("input_ids"), call.get("inputs_embeds")
    if (ids is None) == (x is None):
        return  # the backbone's own error says it best
    given = given_input(call)
    for name in OF_PACKED_ROWS:
        call.pop(name, None)  # each row is one sequence here, as of a packed batch of a single one: they say no more
    refuse_other_places(backbone, call, given)
    batch, length, device = given.shape[0], given.shape[1], given.device
    mask, given_positions, types = (call.get(name) for name in ("attention_mask", "position_ids", "token_type_ids"))
    mask = None if mask is None else mask.to(device)
    rows = current_row_adapters(layer)
    layout = PromptLayout(
        slots,
        lengths=None if rows is None else rows.lengths_of(batch, device),
        pads=None if mask is None else count_left_pads(mask),
        slack=site.slack,
    )
    if layout.lengths is not None:
        refuse_mixed_lengths(backbone, site)
    if site.loses_left_pads:
        refuse_left_pads(backbone, layout)
    positions = given_positions
    if positions is None:
        positions = default_positions(backbone, given, layout, site)
    if positions is not None:
        call["position_ids"] = layout.join_positions(positions.to(device))
    call["attention_mask"] = layout.join_mask(mask, batch, length)
    refuse_too_long(call, slots + length, slots, site)
    # What the caller passed as inputs_embeds came out of `get_input_embeddings()`, our layer: it is adapted already.
    x = layer(ids) if x is None else x
    call["input_ids"] = None
    if types is not None and site.adds_token_types:
        x = x + layer.unadapted(types)
        call["token_type_ids"] = None
    elif types is not None:
        types = types.expand(batch, -1).to(device)
        call["token_type_ids"] = layout.join(types.new_zeros(batch, slots), types)
    call["inputs_embeds"] = layout.to(x.device).join(layer.prompt_rows(batch, slots), x)
    call.layout = layout
    call.mark = CacheMark(layout, None if mask is None else call["attention_mask"])


def packed_layout(
    backbone: nn.Module, call: dict[str, Any], slots: int, layer: InputTuningLayer
) -> PackedLayout | None:
    """How prompts stand in a call whose rows hold several sequences each; None where a row is one sequence.

    As in transformers, such rows come with neither a mask nor a cache, and positions or `cu_seq_lens` tell their
    sequences apart: a position that does not go up starts a new one, and where no cache is made, one that leaves some
    out does too. Bounds say on the host how many sequences there are. Positions have to be looked at, once: it is the
    look that transformers has at them by itself, to make the mask that it is spared here.
    """
    given, positions, bounds = given_input(call), call.get("position_ids"), call.get("cu_seq_lens_q")
    if given is None or call.get("attention_mask") is not None or cache_of(call) is not None or is_generating(layer):
        return None
    batch, length = given.shape[:2]
    rows = current_row_adapters(layer)
    prompts = [slots] * batch if rows is None else rows.prompt_lengths
    if bounds is not None and batch > 1 and positions is None:
        raise ValueError(
            f"`cu_seq_lens_q` describes one row, got a batch of {batch}. Flatten the batch into one row, or pass "
            "`position_ids` that restart."
        )
    if bounds is not None and batch == 1:
        positions, sequences = positions_of(bounds, length), [bounds.shape[0] - 1]
        is_packed = sequences[0] > 1
    elif positions is None or positions.shape[-1] < 2:
        return None
    else:
        refuse_positions_in_compiled_call()
        makes_cache = (
            getattr(backbone.config, "use_cache", False) if call.get("use_cache") is None else call["use_cache"]
        )
        positions = positions.expand(batch, -1)
        counts = sequence_starts(positions).sum(dim=-1)
        restarts = (positions.diff(dim=-1) <= 0).any(dim=-1)
        sequences, restarting = torch.stack([counts, restarts.to(counts)]).tolist()
        is_packed = any(restarting) if makes_cache else max(sequences) > 1
    if not is_packed:
        return None
    places = max(length + count * prompt for count, prompt in zip(sequences, prompts, strict=True))
    lengths = None if rows is None else rows.lengths_of(batch, given.device)
    return PackedLayout.of(positions.to(given.device), slots, lengths, places)


def start_packed(
    backbone: nn.Module, call: SplicedCall, layout: PackedLayout, layer: InputTuningLayer, site: Backbone
) -> None:
    """Rewrites a call whose rows hold several sequences each: every sequence gets the prompt of its row."""
    ids, x, types = (call.get(name) for name in ("input_ids", "inputs_embeds", "token_type_ids"))
    given = given_input(call)
    x = layer(ids) if x is None else x
    if types is not None and site.adds_token_types:
        x = x + layer.unadapted(types)
        call["token_type_ids"] = None
    elif types is not None:
        call["token_type_ids"] = layout.spread(types)
    call["input_ids"] = None
    call["inputs_embeds"] = layout.join(layer.prompt_rows(given.shape[0], layout.slots), x)
    call["position_ids"] = layout.positions
    refuse_too_long(call, layout.positions.shape[1], layout.positions.shape[1] - given.shape[1], site)
    if call.get("seq_idx") is not None:
        call["seq_idx"] = layout.spread(call["seq_idx"])
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if call.get(name) is not None:
            call[name] = moved_bounds(call[name], layout.slots)
    for name in ("max_length_q", "max_length_k"):
        if call.get(name) is not None:
            call[name] += layout.slots
    # The mask is made here, since models make one for packed rows only where they use no cache, and some never.
    call["use_cache"] = False
    call["attention_mask"] = mask_of_packed_rows(layout, backbone.config, call["inputs_embeds"])
    call.layout = layout


def mask_of_packed_rows(layout: PackedLayout, config: PretrainedConfig, x: Tensor) -> Any:
    """The model's own attention mask, in which sequences do not see each other, for embeddings `(batch, N, dim)`.

    Transformers would look for packed sequences in positions, and a GPU would have to wait. Only where attention goes
    by chunks must it have them: a chunk is counted from the start of its sequence.
    """
    number = sequence_starts(layout.positions).cumsum(-1)
    if getattr(config, "attention_chunk_size", None):
        return create_masks_for_generate(config, x, None, None, position_ids=layout.positions)
    alike = partial(_in_one_sequence, number)
    return create_masks_for_generate(config, x, None, None, and_mask_function=alike)


def _in_one_sequence(number: Tensor, row: Any, head: Any, query: Any, key: Any) -> Tensor:
    """A mask function of transformers: whether two places of a row belong to one sequence."""
    return number[row, query] == number[row, key]


def default_positions(backbone: nn.Module, given: Tensor, layout: PromptLayout, site: Backbone) -> Tensor | None:
    """The positions that the backbone would use, where it would not find them by itself any more: RoBERTa counts along
    the ids that are not padding (along embeddings all places), and slack moves the places of a mixed batch. None where
    it still finds them."""
    if site.padding_id is not None:
        if given.ndim == 2:
            is_token = (given != site.padding_id).long()
            return is_token.cumsum(dim=1) * is_token + site.padding_id
        return torch.arange(given.shape[1], device=given.device).expand(given.shape[0], -1) + site.first_position
    if layout.lengths is None or site.positions_from_mask or "position_ids" not in site.parameters:
        return None
    return torch.arange(given.shape[1], device=layout.lengths.device).unsqueeze(0)


def add_token_types(call: SplicedCall, layer: InputTuningLayer, site: Backbone) -> None:
    """GPT-2 looks token types up in the word embedding, where they would pass through the input-adapter: look them up
    in the base embedding here instead."""
    types = call.get("token_type_ids")
    if types is None or not site.adds_token_types or layer.disable_adapters:
        return
    x = layer(call["input_ids"]) if call.get("inputs_embeds") is None else call["inputs_embeds"]
    call.update(input_ids=None, inputs_embeds=x + layer.unadapted(types), token_type_ids=None)


def continue_after_prompt(
    call: SplicedCall, cache: Any, mark: CacheMark, layer: InputTuningLayer, site: Backbone
) -> None:
    """Rewrites a call whose cache holds the prompt: only the mask and the positions have to know of it."""
    new = given_input(call)
    if new is None:
        return
    batch, length = new.shape[:2]
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    layout = mark.layout.repeated(batch)
    past = places_in(cache) - layout.slots
    refuse_expanded_mask(mask)
    if mask is not None:
        refuse_mask_of_other_length(mask, past, length)
        # A chunk that the caller feeds by hand. `generate` looked at its own at the start; at a step nobody looks.
        by_hand = length > 1 and not torch.compiler.is_compiling() and not is_generating(layer)
        if by_hand and site.has_window and layout.pads is not None:
            refuse_pads_behind_prompt(count_left_pads(mask), layout.pads)
    if positions is not None:
        call["position_ids"] = layout.shift_positions(positions)
    elif layout.lengths is not None and "position_ids" in site.parameters and not site.positions_from_mask:
        at = torch.arange(past, past + length, device=new.device).unsqueeze(0)
        call["position_ids"] = layout.shift_positions(at + site.first_position)
    if mask is not None and mark.mask is not None and is_generating(layer):
        known = repeat_rows(mark.mask, batch)  # `generate` only appends to a mask
        call["attention_mask"] = torch.cat([known, mask[:, known.shape[1] - layout.slots :]], dim=1)
    else:
        call["attention_mask"] = layout.join_mask(mask, batch, past + length)
    refuse_too_long(call, layout.slots + past + length, layout.slots, site)
    add_token_types(call, layer, site)

"""Rows that hold several sequences each: every sequence gets the prompt of its row.

As in transformers, such rows come with neither a mask nor a cache, and positions or `cu_seq_lens` tell their sequences
apart. Of positions with four axes (Qwen-VL) the first is that of the text, which tells.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from ..call_state import current_row_adapters, generation_of
from .call import BackboneCall
from .checks import check_can_be_packed, check_not_too_long, check_positions_can_be_read
from .layout import PackedLayout, PromptLayout, moved_bounds, numbers_of, places_in_sequences, sequence_starts


def packed_layout(call: BackboneCall, slots: int) -> PackedLayout | None:
    """How prompts stand in a call whose rows hold several sequences each; None where a row is one sequence.

    As in transformers, such rows come with neither a mask nor a cache, and positions or `cu_seq_lens` tell their
    sequences apart: a position that does not go up starts a new one, and where no cache is made, one that leaves some
    out does too. Bounds say on the host how many sequences there are. Positions have to be looked at, once: it is the
    look that transformers has at them by itself, to make the mask that it is spared here.
    """
    given, arguments, layer = call.given, call.arguments, call.layer
    positions, bounds = arguments.get("position_ids"), arguments.get("cu_seq_lens_q")
    if arguments.get("attention_mask") is not None or call.cache is not None or generation_of(layer) is not None:
        return None
    batch, length = given.shape[:2]
    if bounds is not None and batch > 1 and positions is None:
        raise ValueError(
            f"`cu_seq_lens_q` describes one row, got a batch of {batch}. Flatten the batch into one row, or pass "
            "`position_ids` that restart."
        )
    of_text = _of_text(positions)
    if bounds is not None and batch == 1:
        numbers, sequences = numbers_of(bounds, length), [bounds.shape[0] - 1]
        is_packed = sequences[0] > 1
    elif of_text is None or of_text.shape[-1] < 2:
        return None
    else:
        check_positions_can_be_read()
        of_text = of_text.expand(batch, -1)
        numbers = sequence_starts(of_text).cumsum(-1)
        restarts = (of_text.diff(dim=-1) <= 0).any(dim=-1)
        sequences, restarting = torch.stack([numbers[:, -1], restarts.to(numbers)]).tolist()
        is_packed = any(restarting) if call.makes_cache else max(sequences) > 1
    if not is_packed:
        return None
    if positions is None:
        positions = places_in_sequences(numbers)
    rows = current_row_adapters(layer)
    prompts = [slots] * batch if rows is None else rows.prompt_lengths
    places = max(length + count * prompt for count, prompt in zip(sequences, prompts, strict=True))
    lengths = None if rows is None else rows.lengths_of(batch, given.device)
    return PackedLayout.of(numbers.to(given.device), positions.to(given.device), slots, lengths, places)


def _of_text(positions: Tensor | None) -> Tensor | None:
    """The positions by which transformers tells sequences apart: those of one axis, or the first of four."""
    if positions is None or positions.ndim == 2:
        return positions
    return positions[0] if positions.shape[0] == 4 else None


def pack(call: BackboneCall, layout: PackedLayout) -> None:
    """Rewrites a call whose rows hold several sequences each."""
    check_can_be_packed(call.backbone, call.arguments, call.traits)
    arguments, given = call.arguments, call.given
    batch, places = layout.token.shape
    for name in ("token_type_ids", "seq_idx"):
        if arguments.get(name) is not None:
            arguments[name] = layout.spread(arguments[name])
    rows = current_row_adapters(call.layer)
    lengths = None if rows is None else rows.lengths_of(batch, given.device)
    call.join_input(layout, PromptLayout(layout.slots, lengths).virtual_ids(batch, given.device))
    arguments["position_ids"] = layout.positions
    check_not_too_long(arguments, places, places - given.shape[1], call.traits)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if arguments.get(name) is not None:
            arguments[name] = moved_bounds(arguments[name], layout.slots)
    for name in ("max_length_q", "max_length_k"):
        if arguments.get(name) is not None:
            arguments[name] = arguments[name] + layout.slots  # a tensor may be the caller's
    # The mask is made here, since models make one for packed rows only where they use no cache, and some never.
    arguments["use_cache"] = False
    arguments["attention_mask"] = mask_of_packed_rows(layout, call.backbone)
    call.ask_for_names()
    call.layout, call.places = layout, places


def mask_of_packed_rows(layout: PackedLayout, backbone: nn.Module) -> Any:
    """The backbone's own attention mask, in which sequences do not see each other.

    Transformers would look for packed sequences in positions, and a GPU would have to wait. Only where attention goes
    by chunks must it have them: a chunk is counted from the start of its sequence.
    """
    config, numbers = backbone.config, layout.numbers
    x = torch.empty(*numbers.shape, 0, dtype=backbone.dtype, device=numbers.device)  # the mask is to be like it
    if getattr(config, "attention_chunk_size", None):
        return create_masks_for_generate(config, x, None, None, position_ids=places_in_sequences(numbers))
    alike = partial(_in_one_sequence, numbers)
    return create_masks_for_generate(config, x, None, None, and_mask_function=alike)


def _in_one_sequence(numbers: Tensor, row: Any, head: Any, query: Any, key: Any) -> Tensor:
    """A mask function of transformers: whether two places of a row belong to one sequence."""
    return numbers[row, query] == numbers[row, key]

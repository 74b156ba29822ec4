"""`WithPrompt`: what a backbone has more than its class. Every call of it goes through here."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor

from ..call_state import out_of_graphs_if_mixed
from ..layer import InputTuningLayer
from .backbone import BackboneTraits
from .cache_mark import CacheMark, enter_backbone, has_fixed_size, is_empty, leave_backbone, mark_cache, mark_of
from .call import BackboneCall
from .checks import check_mark_was_not_lost, check_mask_and_positions, check_one_input
from .go_on import go_on
from .layout import PromptLayout
from .outputs import restore
from .packed import pack, packed_layout
from .position_table import use_row_positions
from .reuse import put_prompt_into_cache
from .start import start
from .subclass import Extension


class WithPrompt(Extension):
    """A backbone whose sequences start with a prompt."""

    input_tuning_layer: tuple[InputTuningLayer]
    input_tuning_traits: BackboneTraits

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = BackboneCall(self, self.input_tuning_traits, self.input_tuning_layer[0], args, kwargs)
        _rewrite(call)
        enter_backbone(call.cache)
        try:
            with nullcontext() if call.row_positions is None else use_row_positions(call.row_positions):
                output = super().forward(**call.arguments)  # type: ignore[misc]
        finally:
            leave_backbone(call.cache)
        return restore(call, output)


@out_of_graphs_if_mixed
def _rewrite(call: BackboneCall) -> None:
    call.add_token_types()
    call.look_up_length_first()
    mark = mark_of(call.cache)
    slots = call.layer.slots
    if mark is not None:
        if mark.layout.slots:
            go_on(call, mark)
    elif slots and call.given is not None:  # without an input the model's own error says it best
        if is_empty(call.cache):
            _start(call, slots)
        else:
            check_mark_was_not_lost(call.arguments, call.cache, call.given.shape[1], slots)
            call.mark = CacheMark(PromptLayout(0))


def _cut_mask_of_all_places(call: BackboneCall) -> None:
    """Before transformers 5.21, `generate` of Bloom widens the mask to all places of a cache of a fixed size."""
    mask = call.arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not has_fixed_size(call.cache):
        return
    if mask.shape[1] == call.cache.get_max_length():
        call.arguments["attention_mask"] = mask[:, : call.given.shape[1]]


def _start(call: BackboneCall, slots: int) -> None:
    call.layer.check_weights_in_use()  # before there is a place for each virtual token that a configuration claims
    check_one_input(call.arguments, call.backbone, call.traits)
    _cut_mask_of_all_places(call)
    check_mask_and_positions(call.arguments, call.given)
    packed = packed_layout(call, slots)
    if packed is not None:
        pack(call, packed)
        return
    layout = put_prompt_into_cache(call, slots)
    if layout is None:
        start(call, slots)
        return
    mark = CacheMark(layout)
    mark_cache(call.cache, mark)
    go_on(call, mark)

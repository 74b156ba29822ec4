"""What comes back from the backbone: without the places of virtual tokens, and with a mark on the cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .cache_mark import mark_cache
from .call import BackboneCall
from .checks import check_all_places_came_back, check_cache_is_filled, check_output_is_known
from .layout import PackedLayout, PromptLayout

_KNOWN = ("last_hidden_state", "pooler_output")


def restore(call: BackboneCall, output: Any) -> Any:
    """Takes the places of the virtual tokens out of an output, and marks the cache."""
    if call.mark is not None:
        if call.cache is not None:
            mark_cache(call.cache, call.mark)
        check_cache_is_filled(call, output)
        filled = None if call.traits.cache is None else getattr(output, call.traits.cache, None)
        if filled is not None:
            setattr(output, str(call.traits.cache), mark_cache(filled, call.mark))
    if call.layout is not None:
        _take_out(call, output, call.layout)
    return output.to_tuple() if call.as_tuple else output


def _take_out(call: BackboneCall, output: Any, layout: PromptLayout | PackedLayout) -> None:
    batch, places = output.last_hidden_state.shape[:2]
    check_all_places_came_back(call.backbone, places, call.places)
    if not call.traits.feeds_decoder:
        output.last_hidden_state = layout.remove(output.last_hidden_state)
    for name, dim in (("hidden_states", 1), ("attentions", -2)):
        states = getattr(output, name, None)
        if states is not None:
            # Attention maps keep their virtual columns: that is what the tokens looked at.
            setattr(output, name, tuple(layout.remove(state, dim) for state in states))
    for name, value in list(output.items()):
        if name in _KNOWN or not isinstance(value, Tensor):
            continue
        if value.shape == (batch, places):  # labels and masks that go through
            output[name] = layout.remove(value)
        elif value.ndim == 3:
            check_output_is_known(call.backbone, name, value, (batch, places))
    routers = getattr(output, "router_logits", None)
    if routers is not None:
        output.router_logits = tuple(_of_tokens(router, layout, batch, places) for router in routers)
    pooler = getattr(call.backbone, "pooler", None)
    if pooler is not None and getattr(output, "pooler_output", None) is not None:  # BERT pools the first place
        output.pooler_output = _pooled(call.backbone, output.last_hidden_state)


def _of_tokens(router: Tensor, layout: PromptLayout | PackedLayout, batch: int, places: int) -> Tensor:
    """What the router of a mixture of experts said of the caller's tokens."""
    if router.shape[:2] == (batch, places):  # Switch
        return layout.remove(router)
    if router.shape[0] == batch * places:  # nearly all
        return layout.remove(router.unflatten(0, (batch, places))).flatten(0, 1)
    return router  # Doge's are not of single places


def _pooled(backbone: nn.Module, hidden: Tensor) -> Tensor:
    # ALBERT and BigBird take the first place, and apply the activation, outside of the pooler.
    activation = getattr(backbone, "pooler_activation", None) or getattr(backbone, "activation", None)
    return backbone.pooler(hidden) if activation is None else activation(backbone.pooler(hidden[:, 0]))

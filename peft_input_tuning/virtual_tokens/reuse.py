"""A prompt's keys and values, computed once and used for every request and row.

The prompt stands before everything else and attention is causal, so its keys and values do not depend on the input.
Inside `with reuse_prompts(model):` a call that starts a sequence on an empty cache gets them put into that cache, and
only its own tokens run through the model:

    cache of the call:  [ slack | prompt ]  +  the call: [ left pads | tokens | right pads ]

That the weights stay as they are is the caller's promise: nothing is compared. If the picture would not be exact, the
call takes the usual way (`start.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..call_state import RowAdapters, current_row_adapters, generation_of, on_device, use_row_adapters
from ..layer import named_layer
from .cache_mark import CacheMark, mark_cache
from .call import BackboneCall
from .layout import PromptLayout
from .trial_run import plain_ids, same_but_for_rounding

KeysAndValues = list[tuple[Tensor, Tensor]]  # a layer's `(adapters, heads, slots, head dim)` each
_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # rotary embeddings that change with the length of the sequence


_lock = Lock()


@contextmanager
def reuse_prompts(model: nn.Module) -> Iterator[None]:
    """Computes each adapter's prompt once, and starts every sequence from its keys and values.

    For serving: the caller promises that the weights, the adapters' and the base's, stay as they are inside. Training
    mode, and adding, loading or deleting an adapter, forget what is kept, and so does leaving; other methods' adapters
    may be switched. Calls with gradients,
    compiled ones, and models in which a prompt's keys and values depend on more than the prompt do without.

        with reuse_prompts(model):
            for batch in requests:
                model.generate(**batch)

    Args:
        model: with an input-tuning adapter.

    Raises:
        ValueError: a model without an input-tuning adapter.
    """
    _, layer = named_layer(model)
    with _lock:
        layer.reusers += 1
        layer.prompt_states = {} if layer.prompt_states is None else layer.prompt_states
    try:
        yield
    finally:
        with _lock:
            layer.reusers -= 1
            if not layer.reusers:  # another thread, or a `with` around this one, may go on
                layer.prompt_states = None


def put_prompt_into_cache(call: BackboneCall, slots: int) -> PromptLayout | None:
    """Fills the empty cache of a call with the prompts of its rows, each at the right end of `slots` places.

    Returns:
        How the prompts stand in the cache; None if the call must take the usual way, and nothing was done.
    """
    layer, batch = call.layer, call.given.shape[0]
    if layer.prompt_states is None or not _is_exact(call, slots):
        return None
    rows = current_row_adapters(layer)
    names = (str(layer.enabled_adapter),) * batch if rows is None else tuple(rows.names_of(batch))
    states = _states(call, tuple(dict.fromkeys(names)), slots)
    if states is None:
        return None
    lengths = None if rows is None else rows.lengths_of(batch, call.given.device)
    if len(set(names)) > 1:
        distinct = list(dict.fromkeys(names))
        at = on_device([distinct.index(name) for name in names], states[0][0].device)
        states = [(keys[at.to(keys.device)], values[at.to(keys.device)]) for keys, values in states]
    else:
        states = [(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)) for keys, values in states]
    for index, (keys, values) in enumerate(states):
        _put(call.cache, index, keys, values)
    return PromptLayout(slots, lengths=lengths)


def _put(cache: DynamicCache, index: int, keys: Tensor, values: Tensor) -> None:
    """An empty layer takes keys and values as they are; one with a window keeps count of more."""
    if index < len(cache.layers) and type(cache.layers[index]) is DynamicLayer:
        layer = cache.layers[index]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    else:
        cache.update(keys, values, index)


def _is_exact(call: BackboneCall, slots: int) -> bool:
    """Whether the cache would hold what the usual way puts there. Known from shapes and settings: nobody looks."""
    backbone, traits, cache = call.backbone, call.traits, call.cache
    arguments, generation = call.arguments, generation_of(call.layer)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or backbone.training:
        return False
    if traits.slack == "right" or traits.first_position:
        return False
    if traits.max_positions is not None and slots + call.given.shape[1] > traits.max_positions:
        return False
    if any(isinstance(value, Tensor | dict | list) for name, value in arguments.items() if name not in _TEXT):
        return False  # images, whose places may see each other
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    if not all(type(one) in (DynamicLayer, DynamicSlidingWindowLayer) for one in cache.layers):
        return False  # a recurrent state is more than keys and values
    rope = getattr(backbone.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *rope.values()]  # of all layers, or a dict for each type of layer
    if any(isinstance(kind, dict) and kind.get("rope_type") in _LENGTH_DEPENDENT_ROPE for kind in kinds):
        return False
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if positions is not None and not (generation is not None and generation.makes_positions):
        return False  # the prompt was computed at positions 0, 1, ...
    if positions is not None and not _starts_at_zero(call, positions):
        return False
    if mask is None:
        return True
    # Pads would stand between the prompt and the tokens: in a window they count, and positions must pass over them.
    return not traits.has_window and (positions is not None or traits.positions_from_mask)


def _starts_at_zero(call: BackboneCall, positions: Tensor) -> bool:
    """Whether a model's `generate` counts from 0 (PaliGemma's: from 1). Looked at once."""
    known = call.layer.prompt_states
    assert known is not None
    if "starts at zero" not in known:
        known["starts at zero"] = not bool(positions.amin(dim=-1).any())
    return known["starts at zero"]


def _states(call: BackboneCall, names: tuple[str, ...], slots: int) -> KeysAndValues | None:
    """The keys and values of adapters, in their order, each at the right end of its slots; None if they depend on what
    follows the prompt."""
    known = call.layer.prompt_states
    assert known is not None
    key = (names, slots, _surroundings(call, known))
    if key not in known:
        computed = {name: _compute(call, name) for name in names if call.layer.prompt_length(name)}
        parts = {name: states for name, states in computed.items() if states is not None}
        known[key] = _tables(parts, names, slots) if len(parts) == len(computed) else None
    return known[key]


def _surroundings(call: BackboneCall, known: dict[Any, Any]) -> tuple:
    """What else decides on keys and values, and may change without a change of weights: autocast, other adapters."""
    kind = call.given.device.type
    if "others" not in known:
        parts = call.backbone.modules()
        known["others"] = [one for one in parts if isinstance(one, BaseTunerLayer) and one is not call.layer]
    others = tuple((*one.active_adapters, one.disable_adapters, *one.merged_adapters) for one in known["others"])
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind), others


def _tables(parts: dict[str, KeysAndValues], names: tuple[str, ...], slots: int) -> KeysAndValues:
    nothing = [(keys[:, :, :0], values[:, :, :0]) for keys, values in next(iter(parts.values()))]
    of_each = [parts.get(name, nothing) for name in names]  # nothing of an adapter without a prompt
    return [
        (_table([keys for keys, _ in layers], slots), _table([values for _, values in layers], slots))
        for layers in zip(*of_each, strict=True)
    ]


def _table(parts: list[Tensor], slots: int) -> Tensor:
    """`(1, heads, prompt length, dim)` each → `(adapters, heads, slots, dim)`."""
    return torch.cat([nn.functional.pad(one, (0, 0, slots - one.shape[2], 0)) for one in parts])


@torch.no_grad()
def _compute(call: BackboneCall, name: str) -> KeysAndValues | None:
    """One adapter's keys and values, computed without anything behind the prompt and, to compare, with a few words."""
    length = call.layer.prompt_length(name)
    words = plain_ids(call.backbone, call.layer, 2)
    virtual = PromptLayout(length).virtual_ids(1, words.device)
    alone, followed = _run(call, name, virtual), _run(call, name, torch.cat([virtual, words], dim=1))
    for states, longer in zip(alone, followed, strict=True):
        for one, other in zip(states, longer, strict=True):
            if not same_but_for_rounding(other[:, :, :length], one):
                return None
    return alone


def _run(call: BackboneCall, name: str, ids: Tensor) -> KeysAndValues:
    """A cache without the model's configuration keeps all places, also those that a sliding window would drop. Its
    mark says that the input holds all that there is."""
    layer, cache = call.layer, DynamicCache()
    mark_cache(cache, CacheMark(PromptLayout(0)))
    arguments = {"input_ids": ids, "use_cache": True, str(call.traits.cache): cache}
    with use_row_adapters(layer, RowAdapters((name,), (layer.prompt_length(name),))):
        if layer.adapts_input_only:
            arguments |= {"input_ids": None, "inputs_embeds": layer(ids, is_output=False)}
        call.backbone(**arguments)
    return [(one.keys, one.values) for one in cache.layers]

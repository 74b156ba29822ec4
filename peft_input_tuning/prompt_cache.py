"""A prompt's keys and values, computed once and used for every request and row.

The prompt stands before everything else and attention is causal, so its keys and values do not depend on the input.
At inference, a call that starts a sequence on an empty cache gets them put into that cache, and only its own tokens
run through the model:

    cache of the call:  [ slack | prompt ]  +  the call: [ left pads | tokens | right pads ]

It is off until `set_prompt_cache(model, True)`, for serving, where the base does not change. The states are kept with
the adapter, under a fingerprint of what they come from (prompt, base weights, other adapters, dtype, device), and
computed again when that has changed. Where the picture would not be exact, the call takes the usual way
(`calls.start_with_prompt`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .initialization import execution_device
from .layer import InputTuningLayer
from .row_adapters import current_row_adapters, prompt_in_place
from .splice import PromptLayout, count_left_pads

KeysAndValues = list[tuple[Tensor, Tensor]]  # a layer's `(1, heads, prompt length, head dim)` each
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # rotary embeddings that change with the length of the sequence


@dataclass(frozen=True)
class PromptStates:
    """What is kept of one adapter: the states, and what they were computed from."""

    fingerprint: tuple
    prompt: Tensor
    states: KeysAndValues


def set_prompt_cache(model: nn.Module, enabled: bool) -> None:
    """Switches the cache of prompts' keys and values on or off (the default), for all adapters of a model."""
    for module in model.modules():
        if isinstance(module, InputTuningLayer):
            module.caches_prompt = enabled
            module.prompt_states.clear()


def put_prompt_into_cache(
    backbone: nn.Module, call: dict[str, Any], batch: int, slots: int, layer: InputTuningLayer, has_window: bool
) -> PromptLayout | None:
    """Fills the empty cache of a call with the prompts of its `batch` rows, each at the right end of `slots` places.

    Returns:
        How the prompts stand in the cache; None where the call must take the usual way, and nothing was done.
    """
    cache: Any = call.get("past_key_values")
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if not _is_exact(backbone, cache, mask, positions, layer, has_window):
        return None
    rows = current_row_adapters(layer)
    names = [str(layer.enabled_adapter)] * batch if rows is None else rows.names_of(batch)
    distinct = list(dict.fromkeys(names))
    states = {name: _keys_and_values(backbone, layer, name) for name in distinct if layer.prompt_length(name)}
    at = torch.tensor([distinct.index(name) for name in names])
    for index in range(len(next(iter(states.values())))):
        both = [_table([states.get(name, [])[index : index + 1] for name in distinct], part, slots) for part in (0, 1)]
        keys, values = (table[at.to(table.device)] for table in both)
        cache.update(keys, values, index)
    return PromptLayout(slots, lengths=None if rows is None else rows.lengths_of(batch, keys.device))


def _is_exact(
    backbone: nn.Module,
    cache: Any,
    mask: Tensor | None,
    positions: Tensor | None,
    layer: InputTuningLayer,
    has_window: bool,
) -> bool:
    if not layer.caches_prompt or torch.compiler.is_compiling() or torch.is_grad_enabled() or backbone.training:
        return False
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    if not all(type(one) in (DynamicLayer, DynamicSlidingWindowLayer) for one in cache.layers):
        return False  # a recurrent state is more than keys and values
    rope = getattr(backbone.config, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        return False
    if (has_window or not _knows_pads(backbone, positions)) and mask is not None and not bool(mask.all()):
        return False  # pads would stand between the prompt and the tokens, and count
    # The prompt was computed at positions 0, 1, ...; elsewhere the caller's first token would have to be.
    if positions is None:
        return True
    if mask is None:
        return not bool(positions[:, 0].any())
    pads = count_left_pads(mask).clamp(max=positions.shape[1] - 1)
    return not bool(positions.expand(mask.shape[0], -1).gather(1, pads.to(positions.device)).any())


def _knows_pads(backbone: nn.Module, positions: Tensor | None) -> bool:
    """Whether positions come from the caller or from the mask, so that pads behind the prompt take none."""
    return positions is not None or backbone.config.model_type in ("bloom", "opt")


def _table(parts: list[KeysAndValues], part: int, slots: int) -> Tensor:
    """Keys (0) or values (1) of each adapter at the right end of its slots: `(adapters, heads, slots, dim)`."""
    known = next(one[0][part] for one in parts if one)
    padded = [one[0][part] if one else known.new_zeros(1, known.shape[1], 0, known.shape[3]) for one in parts]
    return torch.cat([nn.functional.pad(one, (0, 0, slots - one.shape[2], 0)) for one in padded])


def _keys_and_values(backbone: nn.Module, layer: InputTuningLayer, name: str) -> KeysAndValues:
    fingerprint = _fingerprint(backbone, layer)
    prompt = layer.input_tuning_prompt[name]().detach()
    known = layer.prompt_states.get(name)
    # The prompt is compared by value: trainers that write through `.data` leave its version as it was.
    if known is not None and known.fingerprint == fingerprint and torch.equal(known.prompt, prompt):
        return known.states
    states = _compute(backbone, layer, name)
    layer.prompt_states[name] = PromptStates(fingerprint, prompt.clone(), states)
    return states


@torch.no_grad()
def _compute(backbone: nn.Module, layer: InputTuningLayer, name: str) -> KeysAndValues:
    layer.check_weights_have_come(name)
    prompt = layer.input_tuning_prompt[name]().unsqueeze(0).to(layer.weight.dtype)
    with prompt_in_place(layer):
        # A cache without the model's configuration keeps all places, also those that a sliding window would drop.
        cache = backbone(inputs_embeds=prompt, past_key_values=DynamicCache(), use_cache=True).past_key_values
    return [(one.keys, one.values) for one in cache.layers]


def _fingerprint(backbone: nn.Module, layer: InputTuningLayer) -> tuple:
    """Changes whenever the base may give other keys and values: optimizer steps, copies and casts of a weight move its
    version or its place, and other methods' adapters are on or off, merged or not. Only a write through a base
    weight's `.data` is not seen; `set_prompt_cache(model, True)` forgets everything then."""
    ours = {id(parameter) for parameter in layer.parameters()}
    weights = tuple((p.data_ptr(), p._version, p.dtype) for p in backbone.parameters() if id(p) not in ours)
    others = tuple(
        (tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters))
        for module in backbone.modules()
        if isinstance(module, BaseTunerLayer) and module is not layer
    )
    device = execution_device(layer.base_layer).type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return weights, others, autocast, backbone.config._attn_implementation

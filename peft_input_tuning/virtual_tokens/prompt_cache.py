"""A prompt's keys and values, computed once and used for every request and row.

The prompt stands before everything else and attention is causal, so its keys and values do not depend on the input.
At inference, a call that starts a sequence on an empty cache gets them put into that cache, and only its own tokens
run through the model:

    cache of the call:  [ slack | prompt ]  +  the call: [ left pads | tokens | right pads ]

The states are kept with the adapter, together with what they come from, and computed again when that has changed
(`_origin`). A call in training mode or with gradients forgets them: trainers write weights in ways that leave no
trace. Where the picture would not be exact, the call takes the usual way (`call.start_with_prompt`).
All of it is off until `set_prompt_cache(model, True)`: noticing changes of the weights costs hundreds of small
operations a prefill, which is more than it saves where the prompt is short or the device is fast.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..base_weights import execution_device, inner_tensors
from ..call_state import RowAdapters, current_row_adapters, on_device, prompt_in_place, use_row_adapters
from ..layer import InputTuningLayer, named_layer
from .backbone import forward_parameters
from .cache_mark import cache_name, cache_of
from .layout import PromptLayout, count_left_pads

KeysAndValues = list[tuple[Tensor, Tensor]]  # a layer's `(1, heads, prompt length, head dim)` each
_SAMPLES = 4  # values of each weight that are looked at
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # rotary embeddings that change with the length of the sequence


@dataclass(frozen=True)
class Origin:
    """What keys and values come from, beside the prompt: settings compared as they are, and samples of the weights."""

    settings: tuple
    samples: Tensor

    def equals(self, other: Origin) -> bool:
        return self.settings == other.settings and torch.equal(self.samples, other.samples)


@dataclass(frozen=True)
class PromptStates:
    """What is kept of one adapter: its prompt's keys and values, and what they were computed from."""

    origin: Origin
    prompt: Tensor
    states: KeysAndValues


def set_prompt_cache(model: nn.Module, enabled: bool) -> None:
    """Switches the cache of prompts' keys and values on or off (the default), for all adapters of a model, and forgets
    what it holds.

    Raises:
        ValueError: a model without an input-tuning adapter.
    """
    _, layer = named_layer(model)
    layer.caches_prompt = enabled
    layer.prompt_states.clear()


def put_prompt_into_cache(
    backbone: nn.Module, call: dict[str, Any], batch: int, slots: int, layer: InputTuningLayer, has_window: bool
) -> PromptLayout | None:
    """Fills the empty cache of a call with the prompts of its `batch` rows, each at the right end of `slots` places.

    Returns:
        How the prompts stand in the cache; None where the call must take the usual way, and nothing was done.
    """
    cache = cache_of(call)
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if not layer.caches_prompt or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() or backbone.training:
        layer.prompt_states.clear()
        return None
    if not _is_exact(backbone, cache, mask, positions, has_window):
        return None
    origin = _origin(backbone, layer)
    if origin is None:
        return None
    rows = current_row_adapters(layer)
    names = [str(layer.enabled_adapter)] * batch if rows is None else rows.names_of(batch)
    distinct = list(dict.fromkeys(names))
    states = {name: _keys_and_values(backbone, layer, name, origin) for name in distinct if layer.prompt_length(name)}
    at = on_device([distinct.index(name) for name in names], execution_device(layer.base_layer))
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
    has_window: bool,
) -> bool:
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    if not all(type(one) in (DynamicLayer, DynamicSlidingWindowLayer) for one in cache.layers):
        return False  # a recurrent state is more than keys and values
    rope = getattr(backbone.config, "rope_parameters", None) or {}
    kinds = [rope, *rope.values()]  # of all layers, or a dict for each type of layer
    if any(isinstance(kind, dict) and kind.get("rope_type") in _LENGTH_DEPENDENT_ROPE for kind in kinds):
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


def _keys_and_values(backbone: nn.Module, layer: InputTuningLayer, name: str, origin: Origin) -> KeysAndValues:
    prompt = layer.input_tuning_prompt[name]().detach()
    known = layer.prompt_states.get(name)
    # The prompt is compared by value: trainers that write through `.data` leave its version as it was.
    if known is not None and known.origin.equals(origin) and torch.equal(known.prompt, prompt):
        return known.states
    states = _compute(backbone, layer, name)
    layer.prompt_states[name] = PromptStates(origin, prompt.clone(), states)
    return states


@torch.no_grad()
def _compute(backbone: nn.Module, layer: InputTuningLayer, name: str) -> KeysAndValues:
    layer.check_weights_have_come(name)
    # The dtype of embeddings, which is not that of a quantized table.
    word = layer.unadapted(torch.zeros(1, 1, dtype=torch.long, device=execution_device(layer.base_layer)))
    prompt = layer.input_tuning_prompt[name]().unsqueeze(0).to(word.dtype)
    with ExitStack() as stack:
        stack.enter_context(prompt_in_place(layer))
        if current_row_adapters(layer) is not None:  # modules_to_save inside the backbone ask for the rows
            stack.enter_context(use_row_adapters(layer, RowAdapters((name,), (0,))))
        # A cache without the model's configuration keeps all places, also those that a sliding window would drop.
        cache = DynamicCache()
        backbone(inputs_embeds=prompt, use_cache=True, **{str(cache_name(forward_parameters(backbone))): cache})
    return [(one.keys, one.values) for one in cache.layers]


def _origin(backbone: nn.Module, layer: InputTuningLayer) -> Origin | None:
    """What the base gives keys and values from.

    Optimizer steps, copies and casts of a weight move its version or its place. Writes through `.data` do neither, so
    a few values of each weight are looked at as well. Other methods' adapters may be on or off, merged or rescaled,
    and modules may have hooks.

    Returns:
        None where weights are elsewhere (offloaded, or shards of several processes).
    """
    ours = {id(module) for module in layer.modules()} - {id(module) for module in layer.base_layer.modules()}
    settings: list[Any] = [backbone.config._attn_implementation]
    weights: list[Tensor] = []
    for module in backbone.modules():
        if id(module) in ours:
            continue
        if isinstance(module, FullyShardedDataParallel):
            return None
        settings += [*module._forward_pre_hooks, *module._forward_hooks]
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            settings += [*module.active_adapters, module.disable_adapters]
            settings += [*getattr(module, "merged_adapters", ()), *getattr(module, "scaling", {}).items()]
        tensors = (*module._parameters.values(), *module._buffers.values())  # buffers hold quantized weights
        weights += [tensor for tensor in tensors if tensor is not None]
    for weight in weights:
        if weight.is_meta or isinstance(weight, DTensor) or hasattr(weight, "ds_id"):  # ds_id: DeepSpeed's ZeRO-3
            return None
    weights = [inner for weight in weights for inner in inner_tensors(weight)]
    for weight in weights:
        version = None if weight.is_inference() else weight._version
        settings += [weight.data_ptr(), version, weight.dtype]
    device = execution_device(layer.base_layer)
    settings.append(torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type))
    return Origin(tuple(settings), _samples(weights, device))


@torch.no_grad()
def _samples(weights: list[Tensor], device: torch.device) -> Tensor:
    """A few values of each weight, `(values,)` in float32 on one device; one copy for each device and dtype."""
    alike: dict[tuple, list[Tensor]] = {}
    for weight in weights:
        flat = weight.detach()
        flat = flat.view(-1) if flat.is_contiguous() else flat[(0,) * flat.ndim].view(1)
        step = max(1, flat.numel() // _SAMPLES)
        alike.setdefault((weight.device, weight.dtype), []).append(flat[::step])
    return torch.cat([torch.cat(values).to(device, torch.float32) for values in alike.values()])

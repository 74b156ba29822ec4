"""Static caches: their masks arrive already expanded and their length is fixed before the backbone is reached, so the
prompt is put in front of the input here, at `generate`, and the hooks stand aside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..base_weights import execution_device
from ..call_state import current_row_adapters
from ..layer import InputTuningLayer
from .cache_mark import cache_of
from .layout import PromptLayout, count_left_pads

# Settings of generate whose processors call the model again or read the encoder's input, and what turns them off.
_LOOKING_ELSEWHERE = {"guidance_scale": 1, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}
DEFAULT_MAX_LENGTH = 20  # of transformers' generate, counted in new tokens beside embeddings


def generation_setting(model: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    """A setting of this call: its own argument, its generation_config, the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    for config in (kwargs.get("generation_config"), model.generation_config):
        if isinstance(config, GenerationConfig) and getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def uses_static_cache(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether `generate(**kwargs)` of a decoder-only model will use a cache of fixed size."""
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    if getattr(cache_of(kwargs), "is_compileable", False):
        return True
    implementation = generation_setting(model, kwargs, "cache_implementation") or ""
    return implementation == "sliding_window" or any(kind in implementation for kind in ("static", "hybrid"))


def input_with_prompt(model: nn.Module, layer: InputTuningLayer, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a `generate` call with the virtual tokens in front of the input.

    Returns:
        Arguments with `inputs_embeds` `(batch, slots + length, dim)`, its mask, and the ids, so that full sequences
        come back; None where there is no prompt to put in.
    """
    rows, slots = current_row_adapters(layer), layer.slots
    if not slots:
        return None
    cache = cache_of(kwargs)
    if cache is not None and int(cache.get_seq_length()):
        raise ValueError(
            f"The cache is a {type(cache).__name__} of fixed size that is not empty: going on from it is not "
            "supported with virtual tokens. Pass an empty one (`.reset()`), or use a dynamic cache."
        )
    for name, neutral in _LOOKING_ELSEWHERE.items():
        value = generation_setting(model, kwargs, name)
        if value not in (None, neutral):
            raise ValueError(
                f"`{name}` is {value}, which reads the input beside the cache, and a static cache has virtual tokens "
                "in it. Use a dynamic cache."
            )
    kwargs = dict(kwargs)
    ids = kwargs.pop("inputs", None)
    ids = kwargs.pop("input_ids", None) if ids is None else ids
    x = kwargs.get("inputs_embeds")
    kwargs.pop("position_ids", None)  # generate derives them from the mask, for the prompt too
    if ids is None and x is None:
        raise ValueError("`generate` needs `input_ids` or `inputs_embeds`, got neither.")
    x = layer(ids.to(execution_device(layer.base_layer)), is_output=False) if x is None else x
    batch, length = x.shape[:2]
    mask = kwargs.get("attention_mask")
    mask = mask_of_ids(model, ids, kwargs) if mask is None else mask
    layout = PromptLayout(
        slots,
        lengths=None if rows is None else rows.lengths_of(batch, x.device),
        pads=None if mask is None else count_left_pads(mask.to(x.device)),
    )
    mask = torch.ones(batch, length, dtype=torch.long) if mask is None else mask
    kwargs["inputs_embeds"] = layout.join(layer.prompt_rows(batch, slots), x)
    kwargs["attention_mask"] = layout.join_mask(mask.to(x.device), batch, length)
    if ids is not None:
        kwargs["input_ids"] = ids
    _count_new_tokens(model, kwargs, 0 if ids is None else ids.shape[1])
    return kwargs


def mask_of_ids(model: nn.Module, ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask that `generate` would infer from padding in the ids; beside embeddings it does not look."""
    pad, eos = generation_setting(model, kwargs, "pad_token_id"), generation_setting(model, kwargs, "eos_token_id")
    if ids is None or pad is None or pad in (eos if isinstance(eos, list) else [eos]) or not (ids == pad).any():
        return None
    return (ids != pad).long()


def _count_new_tokens(model: nn.Module, kwargs: dict[str, Any], length: int) -> None:
    """Lengths that count the input become numbers of new tokens: the input is longer now."""
    for total, new, default in (
        ("max_length", "max_new_tokens", length + DEFAULT_MAX_LENGTH),
        ("min_length", "min_new_tokens", None),
    ):
        limit = generation_setting(model, kwargs, new)
        if limit is None:
            whole = generation_setting(model, kwargs, total)
            whole = default if whole is None else whole
            limit = None if whole is None else max(whole - length, 0)
        kwargs.pop(total, None)
        if limit is not None:
            kwargs[new] = limit

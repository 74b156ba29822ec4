"""The model around the backbone, where a caller comes in: what only it can know of a call.

forward     `adapter_names`, which nobody else may read (a bare base model, a model with adapters of transformers);
            which tokens are the output's, from `labels` (`scope.py`)
generate    the same for a whole generation; room for virtual tokens in caches of a fixed size
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from ..call_state import Generation, current_row_adapters, generating, use_row_adapters
from ..layer import InputTuningLayer
from .backbone import BackboneTraits, forward_parameters
from .cache_mark import cache_of, mark_cache, mark_of, without_masks
from .checks import (
    check_mask_length,
    check_masks_on_cache,
    check_no_embeddings,
    check_no_pads_behind_prompt,
    check_room,
)
from .layout import count_left_pads
from .mixed_batch import mixed_batch
from .scope import embeddings_in_scope, input_of_generate
from .subclass import Extension
from .with_prompt import WithPrompt


class Entrance(Extension):
    """A model with an input-tuning adapter somewhere in it."""

    needs_forward = False  # it is called first
    input_tuning_layer: tuple[InputTuningLayer]
    input_tuning_traits: BackboneTraits | None = None  # of its backbone, if it has one
    input_tuning_backbone: str | None = None  # and where that is

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """TRL puts a `forward` of its own on a model: what `forward` does is done here too, and then not again."""
        with self._rows(kwargs.pop("adapter_names", None), kwargs):
            if current_row_adapters(self.input_tuning_layer[0]) is not None:
                check_no_embeddings(kwargs)
            args, kwargs = self._in_scope(args, kwargs)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._rows(kwargs.pop("adapter_names", None), kwargs):
            args, kwargs = self._in_scope(args, kwargs)
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """The embedding is wrapped, so only a resize that changes nothing is possible."""
        (layer,) = self.input_tuning_layer
        if new_num_tokens in (None, layer.num_embeddings) and not kwargs.get("pad_to_multiple_of"):
            return layer
        raise ValueError(
            f"`new_num_tokens` is {new_num_tokens}, but the embedding ({layer.num_embeddings} tokens) cannot be "
            "resized once input-tuning wraps it. Resize the base model first, then call get_peft_model."
        )

    def _check_backbone(self) -> None:
        if self.input_tuning_backbone is None or torch.compiler.is_compiling():
            return
        backbone = self.get_submodule(self.input_tuning_backbone)  # type: ignore[attr-defined]
        if isinstance(backbone, WithPrompt):
            return
        if not any(isinstance(part, WithPrompt) for part in backbone.modules()):  # FSDP and torch.compile wrap it
            raise ValueError(
                f"The backbone `{self.input_tuning_backbone}` was replaced by a {type(backbone).__name__} after "
                "input-tuning was added, and knows of no prompt. Replace it first, then call get_peft_model."
            )

    def _in_scope(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        (layer,) = self.input_tuning_layer
        if not layer.adapts_input_only:
            return args, kwargs
        call = dict(zip(forward_parameters(self), args, strict=False)) | kwargs
        return (), embeddings_in_scope(call, layer)

    @contextmanager
    def _rows(self, names: list[str] | None, call: dict[str, Any]) -> Iterator[None]:
        self._check_backbone()
        if names is None:
            yield
            return
        check_no_embeddings(call)
        (layer,) = self.input_tuning_layer
        with mixed_batch(self, layer, names, layer.adapter_names):
            yield


class MakesCaches(Extension):
    """A model that generates: caches of a fixed size get room for the virtual tokens. Its methods are called by
    transformers' `generate` (seen in 5.20 to 5.24), of the model or of one inside of it (BLIP-2)."""

    needs_forward = False
    input_tuning_layer: tuple[InputTuningLayer]

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """A cache of a fixed size gets room for the virtual tokens, and is known from its first call on."""
        (layer,) = self.input_tuning_layer
        slots = 0 if self.config.is_encoder_decoder else layer.slots  # type: ignore[attr-defined]
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + slots
        )
        cache = cache_of(model_kwargs)
        if slots and getattr(cache, "is_compileable", False) and mark_of(cache) is None:
            mark_cache(cache, None)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Masks stay `(batch, length)`: the backbone puts the virtual tokens in, and expands them."""
        with without_masks(cache_of(kwargs)):
            return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]


class GeneratingEntrance(MakesCaches, Entrance):
    """A model with an input-tuning adapter that can generate."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = _by_name(super().generate, args, kwargs)  # type: ignore[misc]
        (layer,) = self.input_tuning_layer
        with self._rows(kwargs.pop("adapter_names", None), kwargs), ExitStack() as stack:
            rows = current_row_adapters(layer)
            if rows is not None:
                stack.enter_context(use_row_adapters(layer, replace(rows, in_generate=True)))
            self._check_generation(kwargs)
            chunk = self._setting(kwargs, "prefill_chunk_size")
            own = kwargs.get("position_ids") is None
            stack.enter_context(generating(layer, Generation(in_chunks=bool(chunk), makes_positions=own)))
            if layer.adapts_input_only:
                stack.enter_context(input_of_generate(layer, kwargs, kwargs.pop("labels", None)))
            return super().generate(**kwargs)  # type: ignore[misc]

    def _check_generation(self, kwargs: dict[str, Any]) -> None:
        (layer,) = self.input_tuning_layer
        if kwargs.get("cache_implementation") == "paged" and layer.slots:
            raise ValueError(
                '`cache_implementation` "paged" batches requests by itself and leaves no room for virtual tokens.'
            )
        ids = kwargs.get("inputs") if kwargs.get("inputs") is not None else kwargs.get("input_ids")
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        mark = mark_of(cache)
        if mark is not None:
            mark_cache(cache, replace(mark, mask=None))  # of an earlier call, whose mask may have been another
            if mark.layout.slots and ids is not None and mask is not None and mask.shape[1] > ids.shape[1]:
                check_mask_length(mask, cache.get_seq_length(), ids.shape[1])
        chunk, traits = self._setting(kwargs, "prefill_chunk_size"), self.input_tuning_traits
        if not layer.slots or traits is None:
            return
        new, is_pair = self._setting(kwargs, "max_new_tokens"), self.config.is_encoder_decoder  # type: ignore[attr-defined]
        if isinstance(new, int) and ids is not None and not is_pair and mark is None:
            check_room(cache, layer.slots + ids.shape[1] + new - 1)  # the last token goes in no more
        if traits.masks_on_cache is False and self._setting(kwargs, "use_cache") is not False:
            rows = current_row_adapters(layer)
            mask = self._mask_of_ids(ids, kwargs) if mask is None else mask
            check_masks_on_cache(self, mask, () if rows is None else rows.prompt_lengths)
        if chunk and traits.has_window:
            mask = self._mask_of_ids(ids, kwargs) if mask is None else mask
            if mask is not None:
                check_no_pads_behind_prompt(count_left_pads(mask), chunk)

    def _setting(self, kwargs: dict[str, Any], name: str) -> Any:
        """A setting of this call: its own argument, its generation_config, the model's."""
        if kwargs.get(name) is not None:
            return kwargs[name]
        for config in (kwargs.get("generation_config"), self.generation_config):  # type: ignore[attr-defined]
            if isinstance(config, GenerationConfig) and getattr(config, name, None) is not None:
                return getattr(config, name)
        return None

    def _mask_of_ids(self, ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """The mask that `generate` would infer from padding in the ids."""
        pad, eos = self._setting(kwargs, "pad_token_id"), self._setting(kwargs, "eos_token_id")
        if ids is None or pad is None or pad in (eos if isinstance(eos, list) else [eos]) or not (ids == pad).any():
            return None
        return (ids != pad).long()


def _by_name(generate: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names; a `generate` that takes `*args` hands them on to transformers'."""
    parameters = list(inspect.signature(generate).parameters.values())
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        parameters = list(inspect.signature(GenerationMixin.generate).parameters.values())[1:]
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(f"`generate` takes {len(names)} arguments by position, got {len(args)}.")
    given = dict(zip(names, args, strict=False))
    twice = given.keys() & kwargs.keys()
    if twice:
        raise TypeError(f"`generate` got multiple values for the argument `{min(twice)}`.")
    return given | kwargs

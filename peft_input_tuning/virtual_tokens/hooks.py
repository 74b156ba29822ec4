"""Virtual tokens are born at the backbone's entrance and die at its exit: the hooks that see to it.

    caller ──► pre-hook: ids → embeddings, prompt in ──► backbone ──► post-hook: prompt out ──► head, loss, caller

The backbone is the module that consumes the word embeddings: LlamaModel, GPT2Model, OPTDecoder, BertModel, the encoder
of T5 and BART. Hooks, because many callers never touch the tuner (plain `PeftModel.forward`, adapters that
transformers added, trainers that call the backbone, the encoder inside `generate`). The backbone, because outside of
it all that counts places (labels, logits_to_keep, classification pooling) would have to be corrected one by one.

Hooks are module-level functions which find the layer by its path, so that models with adapters can be copied and
pickled. What one call needs later travels on its own kwargs (`SplicedCall`): nothing is kept on a module, two threads
may run one model. What later calls need travels on the cache, which also marks it as ours.

Encoder-decoder models: the encoder's last hidden state keeps its virtual places, since the decoder must see them;
its mask is extended at the decoder's entrance, and the caller's copy is cut at the exit of their common parent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..call_state import current_row_adapters, is_prompt_in_place
from ..layer import InputTuningLayer
from .backbone import Backbone, describe_backbone, find_decoder, find_layer, forward_parameters
from .cache_mark import CacheMark, cache_of, enter_backbone, leave_backbone, mark_cache, mark_of
from .call import (
    SplicedCall,
    add_token_types,
    continue_after_prompt,
    given_input,
    packed_layout,
    start_on_prompt_cache,
    start_packed,
    start_with_prompt,
)
from .layout import PackedLayout, PromptLayout, count_left_pads
from .refusals import refuse_shortened, refuse_what_cannot_be_packed, refuse_what_cannot_be_spliced
from .scope import adapt_input_only


def put_prompt_in(backbone: nn.Module, args: tuple, kwargs: dict[str, Any], *, site: Backbone):
    """Pre-hook of the backbone."""
    layer = find_layer(backbone, site)
    call = SplicedCall(zip(site.parameters, args, strict=False))
    call.update(kwargs)
    cache = cache_of(call)
    mark = mark_of(cache)
    enter_backbone(cache)
    if mark is not None:
        if mark.layout.slots:
            continue_after_prompt(call, cache, mark, layer, site)
        return (), call
    if is_prompt_in_place(layer):
        call.mark = CacheMark(PromptLayout(0))
        return (), call
    slots = layer.slots
    if not slots or (cache is not None and not _is_empty(cache)):
        add_token_types(call, layer, site)
        return (), call
    refuse_what_cannot_be_spliced(call, cache, site)
    packed = packed_layout(backbone, call, slots, layer)
    if packed is not None:
        refuse_what_cannot_be_packed(backbone, call, site)
        start_packed(backbone, call, packed, layer, site)
    elif start_on_prompt_cache(backbone, call, slots, layer, site):
        return (), call
    else:
        start_with_prompt(backbone, call, slots, layer, site)
    call.as_tuple = _wants_tuple(backbone, call)
    call["return_dict"] = True
    return (), call


def _is_empty(cache: Any) -> bool:
    """Static caches are refused later by name; asking them for their length would make a GPU wait."""
    return getattr(cache, "is_compileable", False) or cache.get_seq_length() == 0


def _wants_tuple(module: nn.Module, call: dict[str, Any]) -> bool:
    return_dict = call.get("return_dict")
    return not (module.config.return_dict if return_dict is None else return_dict)


def take_prompt_out(backbone: nn.Module, args: tuple, call: dict[str, Any], output: Any, *, site: Backbone):
    """Post-hook of the backbone."""
    if not isinstance(call, SplicedCall):
        return None
    cache = None if site.cache is None else getattr(output, site.cache, None)
    if cache is not None and call.mark is not None:
        mark_cache(cache, call.mark)
    layout = call.layout
    if layout is None:
        return None
    batch, places = output.last_hidden_state.shape[:2]
    refuse_shortened(backbone, places, call["inputs_embeds"].shape[1])
    if not site.feeds_decoder:
        output.last_hidden_state = layout.remove(output.last_hidden_state)
    for name, dim in (("hidden_states", 1), ("attentions", -2)):
        states = getattr(output, name, None)
        if states is not None:
            # Attention maps keep their virtual columns: that is what the tokens looked at.
            setattr(output, name, tuple(layout.remove(state, dim) for state in states))
    routers = getattr(output, "router_logits", None)
    if routers is not None:
        output.router_logits = tuple(_of_tokens(router, layout, batch, places) for router in routers)
    if getattr(output, "pooler_output", None) is not None:  # BERT pools the first place, which was a virtual token
        output.pooler_output = _pooled(backbone, output.last_hidden_state)
    return output.to_tuple() if call.as_tuple else output


def leave_cache(backbone: nn.Module, args: tuple, call: dict[str, Any], output: Any, *, site: Backbone):
    """Post-hook of the backbone, run after errors as well: from now on its cache tells the number of tokens again."""
    leave_backbone(cache_of({**dict(zip(site.parameters, args, strict=False)), **call}))


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


# ---- around an encoder-decoder model's decoder ----------------------------------------------------------------------


def show_prompt_to_decoder(
    decoder: nn.Module, args: tuple, kwargs: dict[str, Any], *, layer: InputTuningLayer, site: Backbone
):
    """Pre-hook of the decoder: the encoder's output holds virtual places, which the caller's mask does not know."""
    call = dict(zip(site.parameters, args, strict=False)) | kwargs
    hidden, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
    rows = current_row_adapters(layer)
    if hidden is None or (mask is None and rows is None) or (mask is not None and mask.ndim != 2):
        return None
    batch, length = hidden.shape[:2]
    if mask is not None:
        length = mask.shape[1]
    elif rows is not None:
        length -= rows.slots
    layout = encoder_layout(hidden, mask, length, layer, site)
    if layout is None:
        return None
    call["encoder_attention_mask"] = layout.join_mask(mask, batch, length)
    return (), call


def encoder_layout(
    hidden: Tensor, mask: Tensor | None, length: int, layer: InputTuningLayer, site: Backbone
) -> PromptLayout | None:
    """The layout of an encoder's output for `length` tokens of the caller; None where it holds no virtual tokens."""
    slots = hidden.shape[1] - length
    if not slots:
        return None
    rows = current_row_adapters(layer)
    known = [rows.slots] if rows is not None else [layer.prompt_length(name) for name in layer.adapter_names]
    if slots not in known:
        raise ValueError(
            f"`attention_mask` has {length} places for {hidden.shape[1]} places of the encoder's output. The mask "
            f"must fit the input, without the virtual tokens ({', '.join(map(str, known))})."
        )
    return PromptLayout(
        slots,
        lengths=None if rows is None else rows.lengths_of(hidden.shape[0], hidden.device),
        pads=None if mask is None else count_left_pads(mask.to(hidden.device)),
        slack=site.slack,
    )


def ask_for_named_outputs(parent: nn.Module, args: tuple, kwargs: dict[str, Any], *, site: Backbone):
    """Pre-hook of the module around encoder and decoder."""
    call = SplicedCall(zip(site.parameters, args, strict=False))
    call.update(kwargs)
    call.as_tuple = _wants_tuple(parent, call)
    call["return_dict"] = True
    return (), call


def take_prompt_out_of_encoder_output(
    parent: nn.Module, args: tuple, call: SplicedCall, output: Any, *, layer: InputTuningLayer, site: Backbone
):
    """Post-hook of the module around encoder and decoder: the caller's copy of the encoder's output is aligned.

    An encoder's output that the caller brought (`encoder_outputs=`) is echoed as it came.
    """
    hidden = getattr(output, "encoder_last_hidden_state", None)
    given = given_input(call)
    if hidden is not None and given is not None and call.get("encoder_outputs") is None:
        layout = encoder_layout(hidden, call.get("attention_mask"), given.shape[1], layer, site)
        if layout is not None:
            output.encoder_last_hidden_state = layout.remove(hidden)
    return output.to_tuple() if call.as_tuple else output


# ---- installing and removing ---------------------------------------------------------------------------------------

_PRE_HOOKS = (put_prompt_in, show_prompt_to_decoder, ask_for_named_outputs, adapt_input_only)
_POST_HOOKS = (take_prompt_out, take_prompt_out_of_encoder_output, leave_cache)


def install_hooks(model: nn.Module, backbone_path: str, embedding_path: str) -> None:
    """Puts the hooks on a model whose embedding is wrapped; does nothing where they are there already."""
    backbone = model.get_submodule(backbone_path)
    if _our_hooks(backbone._forward_pre_hooks, _PRE_HOOKS):
        return
    site = describe_backbone(model, backbone_path, embedding_path)
    layer = find_layer(backbone, site)
    if backbone is not model:
        path = ".".join(filter(None, (backbone_path, embedding_path)))
        scope = partial(adapt_input_only, embedding_path=path, parameters=forward_parameters(model))
        model.register_forward_pre_hook(scope, with_kwargs=True)
    backbone.register_forward_pre_hook(partial(put_prompt_in, site=site), with_kwargs=True)
    backbone.register_forward_hook(partial(take_prompt_out, site=site), with_kwargs=True)
    backbone.register_forward_hook(partial(leave_cache, site=site), with_kwargs=True, always_call=True)
    decoder_path = find_decoder(model, backbone)
    if decoder_path is None:
        return
    decoder = model.get_submodule(decoder_path)
    parent = model.get_submodule(backbone_path.rpartition(".")[0])
    at_decoder = replace(site, parameters=forward_parameters(decoder))
    at_parent = replace(site, parameters=forward_parameters(parent))
    decoder.register_forward_pre_hook(partial(show_prompt_to_decoder, layer=layer, site=at_decoder), with_kwargs=True)
    parent.register_forward_pre_hook(partial(ask_for_named_outputs, site=at_parent), with_kwargs=True)
    parent.register_forward_hook(
        partial(take_prompt_out_of_encoder_output, layer=layer, site=at_parent), with_kwargs=True
    )


def remove_hooks(model: nn.Module) -> None:
    """Takes all hooks of this package off a model.

    Leans on torch's private tables of hooks (`_forward_pre_hooks`, `_forward_hooks`, since torch 2.0): handles do not
    survive copying and pickling of a model.
    """
    for module in model.modules():
        for hook_id in _our_hooks(module._forward_pre_hooks, _PRE_HOOKS):
            del module._forward_pre_hooks[hook_id]
            module._forward_pre_hooks_with_kwargs.pop(hook_id, None)
        for hook_id in _our_hooks(module._forward_hooks, _POST_HOOKS):
            del module._forward_hooks[hook_id]
            module._forward_hooks_with_kwargs.pop(hook_id, None)
            module._forward_hooks_always_called.pop(hook_id, None)


def _our_hooks(hooks: dict[int, Callable], functions: tuple[Callable, ...]) -> list[int]:
    return [key for key, hook in hooks.items() if isinstance(hook, partial) and hook.func in functions]

"""Virtual tokens are born at the backbone's entrance and die at its exit: the hooks that see to it.

    caller ──► pre-hook: ids → embeddings, prompt in ──► backbone ──► post-hook: prompt out ──► head, loss, caller

The backbone is the module that consumes the word embeddings: LlamaModel, GPT2Model, OPTDecoder, BertModel, the encoder
of T5 and BART. Hooks, because many callers never touch the tuner (plain `PeftModel.forward`, adapters that
transformers added, trainers that call the backbone, the encoder inside `generate`). The backbone, because outside of
it everything that counts places (labels, logits_to_keep, classification pooling) would have to be corrected one by one.

Hooks are module-level functions which find the layer by its path, so that models with adapters can be copied and
pickled. What one call needs later travels on its own kwargs (`SplicedCall`): nothing is kept on a module, two threads
may run one model. What later calls need travels on the cache, which also marks it as ours.

Encoder-decoder models: the encoder's last hidden state keeps its virtual places, since the decoder must see them;
its mask is extended at the decoder's entrance, and the caller's copy is cut at the exit of their common parent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layer import InputTuningLayer
from .modules import base_embedding
from .prompt_cache import put_prompt_into_cache
from .row_adapters import current_row_adapters, is_prompt_in_place
from .splice import PromptLayout, count_left_pads

MARK_ON_CACHE = "_input_tuning_prompt"
FLASH_KWARGS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class Backbone:
    """What the hooks have to know of a backbone; plain values, so that it can be pickled and compiled.

    Args:
        embedding: path of the wrapped embedding inside the backbone.
        parameters: names of the arguments of its `forward`.
        feeds_decoder: whether a decoder reads its output, so that virtual places stay in the last hidden state.
        slack: where unused slots of a mixed batch go, see `splice.py`.
        positions_from_mask: whether positions that are not passed are counted along the mask (OPT).
        position_owner: path of the module that derives positions from ids (RoBERTa), or None.
        first_position: the position of a row's first token (RoBERTa starts after the padding's).
        max_positions: rows of its table of absolute positions, or None.
        has_window: whether attention sees only the nearest places (Mistral, Gemma).
        adds_token_types: whether token types go through the word embedding (GPT-2).
    """

    embedding: str
    parameters: tuple[str, ...]
    feeds_decoder: bool = False
    slack: str = "left"
    positions_from_mask: bool = False
    position_owner: str | None = None
    first_position: int = 0
    max_positions: int | None = None
    has_window: bool = False
    adds_token_types: bool = False


@dataclass(frozen=True)
class CachedPrompt:
    """The mark on a cache that holds a prompt.

    Args:
        layout: how the prompts stand in its rows; 0 slots where the caller's own input held them.
        first_position: `(batch or 1, 1)`, the first token's position, where the caller passed positions.
    """

    layout: PromptLayout
    first_position: Tensor | None = None


class SplicedCall(dict):
    """The kwargs of one call of the backbone, and what its post-hook has to undo."""

    cached: CachedPrompt | None = None  # of a call that put a prompt in
    as_tuple: bool = False  # the caller asked for return_dict=False


# ---- finding the modules -------------------------------------------------------------------------------------------


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def consumes_embeddings(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and "inputs_embeds" in forward_parameters(module)


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    for path, module in model.named_modules(remove_duplicate=False):
        if module is wanted:
            return path
    raise ValueError(f"{type(wanted).__name__} is not a part of {type(model).__name__}.")


def find_backbone(model: nn.Module) -> tuple[str, str]:
    """Paths of the backbone in the model and of the word embedding in the backbone.

    Raises:
        ValueError: the model has no token embedding, or no module that takes `inputs_embeds`.
    """
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    if encoder is not None and encoder is not model and consumes_embeddings(encoder):
        return path_of(model, encoder), path_of(encoder, _word_embedding(encoder))
    embedding = _word_embedding(model)
    path = path_of(model, embedding)
    parent = path
    while parent:
        parent = parent.rpartition(".")[0]
        if consumes_embeddings(model.get_submodule(parent)):
            return parent, path[len(parent) + 1 :] if parent else path
    raise ValueError(
        f"No part of {type(model).__name__} around its embedding `{path}` takes `inputs_embeds`, so there is no place "
        "for virtual tokens. Input-tuning needs a model of transformers that accepts `inputs_embeds`."
    )


def _word_embedding(model: nn.Module) -> nn.Module:
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    table = base_embedding(embedding)
    if not isinstance(getattr(table, "weight", None), Tensor) or not hasattr(table, "num_embeddings"):
        raise ValueError(
            f"{type(model).__name__} has no token embedding: `get_input_embeddings()` gave "
            f"{type(embedding).__name__}. Input-tuning needs a text model of transformers."
        )
    return embedding


def find_decoder(model: nn.Module, backbone: nn.Module) -> str | None:
    """Path of the decoder that reads the backbone's output; None where there is none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model or decoder is backbone or not isinstance(decoder, nn.Module):
        return None
    if backbone in decoder.modules() or "encoder_hidden_states" not in forward_parameters(decoder):
        return None
    return path_of(model, decoder)


def describe_backbone(model: nn.Module, backbone_path: str, embedding_path: str) -> Backbone:
    """Reads off a model what the hooks need to know; called before the embedding is wrapped or after."""
    backbone = model.get_submodule(backbone_path)
    parameters = forward_parameters(backbone)
    owner_path = embedding_path.rpartition(".")[0]
    owner = backbone.get_submodule(owner_path)
    table = next((m for p, m in backbone.named_modules() if _is_position_table(p)), None)
    by_place = table is not None and "position_ids" not in parameters
    from_ids = hasattr(owner, "create_position_ids_from_input_ids")
    first_position = owner.padding_idx + 1 if from_ids else 0
    return Backbone(
        embedding=embedding_path,
        parameters=parameters,
        feeds_decoder=find_decoder(model, backbone) is not None,
        slack="right" if by_place else "left",
        positions_from_mask=table is not None and "attention_mask" in forward_parameters(table),
        position_owner=owner_path if from_ids else None,
        first_position=first_position,
        max_positions=_max_positions(table, first_position),
        has_window=bool(getattr(backbone.config, "sliding_window", None)),
        adds_token_types="token_type_ids" in parameters and not hasattr(owner, "token_type_embeddings"),
    )


def _is_position_table(path: str) -> bool:
    return path.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings")


def _max_positions(table: nn.Module | None, first_position: int) -> int | None:
    if not isinstance(table, nn.Embedding):
        return None
    return table.num_embeddings - first_position - getattr(table, "offset", 0)  # OPT and BART keep rows for an offset


def find_layer(backbone: nn.Module, site: Backbone) -> InputTuningLayer:
    layer = backbone.get_submodule(site.embedding)
    if not isinstance(layer, InputTuningLayer):
        refuse_changed_embedding(backbone, site.embedding, layer)
    return layer


def refuse_changed_embedding(backbone: nn.Module, path: str, now: nn.Module) -> NoReturn:
    raise ValueError(
        f"The embedding `{path}` of {type(backbone).__name__} was resized, replaced or wrapped after "
        f"input-tuning was added: it is a {type(now).__name__} now, and the input-adapter would be left out. "
        "Resize the embedding, or add other adapters to it, before input-tuning."
    )


# ---- the backbone's hooks ------------------------------------------------------------------------------------------


def put_prompt_in(backbone: nn.Module, args: tuple, kwargs: dict[str, Any], *, site: Backbone):
    """Pre-hook of the backbone."""
    layer = find_layer(backbone, site)
    call = SplicedCall(zip(site.parameters, args, strict=False))
    call.update(kwargs)
    cache = call.get("past_key_values")
    cached = cached_prompt(cache)
    if cached is not None:
        if cached.layout.slots:
            continue_after_prompt(call, cache, cached, layer, site)
        return (), call
    if is_prompt_in_place(layer):
        call.cached = CachedPrompt(PromptLayout(0))
        return (), call
    slots = prompt_slots(layer)
    if not slots or (cache is not None and not _is_empty(cache)):
        add_token_types(call, layer, site)
        return (), call
    refuse_what_cannot_be_spliced(call, cache)
    if start_on_prompt_cache(backbone, call, slots, layer, site):
        return (), call
    start_with_prompt(backbone, call, slots, layer, site)
    call.as_tuple = _wants_tuple(backbone, call)
    call["return_dict"] = True
    return (), call


def cached_prompt(cache: Any) -> CachedPrompt | None:
    """The mark on a cache; None where the cache is empty or was filled without a prompt.

    The length of a cache that was filled from the caller's own input (0 slots) is not asked for: static caches keep it
    on the device.
    """
    cached = getattr(cache, MARK_ON_CACHE, None)
    if cached is None or (cached.layout.slots and not cache.get_seq_length()):
        return None
    return cached


def prompt_slots(layer: InputTuningLayer) -> int:
    """Length of the longest prompt in this call; 0 where nothing is to be put in."""
    if layer.disable_adapters:
        return 0
    rows = current_row_adapters(layer)
    if rows is not None:
        return rows.slots
    name = layer.enabled_adapter
    return 0 if name is None else layer.prompt_length(name)


def _is_empty(cache: Any) -> bool:
    """Static caches are refused later by name; asking them for their length would make a GPU wait."""
    return getattr(cache, "is_compileable", False) or cache.get_seq_length() == 0


def refuse_what_cannot_be_spliced(call: SplicedCall, cache: Any) -> None:
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"`past_key_values` is a {type(cache).__name__} of fixed size, which has no room for the virtual tokens. "
            "Call `generate` of the PeftModel (with a task type), which makes room, or use a dynamic cache."
        )
    refuse_expanded_mask(mask)
    packed = [name for name in FLASH_KWARGS if call.get(name) is not None]
    if packed:
        raise ValueError(
            f"`{packed[0]}` says that several sequences are packed into one row, which is not supported: only the "
            "first would get the prompt. Pass one sequence a row, with padding."
        )
    if positions is not None:
        refuse_positions(positions, mask)


def refuse_expanded_mask(mask: Any) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"`attention_mask` must have the shape (batch, length), got {shape}: virtual tokens cannot be added to "
            "a mask that is already expanded. Pass the two-dimensional mask."
        )


def refuse_positions(positions: Tensor, mask: Tensor | None) -> None:
    if positions.ndim != 2:
        raise ValueError(f"`position_ids` must have the shape (batch, length), got {tuple(positions.shape)}.")
    if torch.compiler.is_compiling():
        return  # a look at the values would break the graph
    restarts = positions.diff(dim=-1) <= 0
    if mask is not None and mask.shape[-1] == positions.shape[-1]:
        restarts = restarts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if restarts.any():
        raise ValueError(
            "`position_ids` restart inside a row: several sequences are packed into it, which is not supported, since "
            "only the first would get the prompt. Pass one sequence a row, with padding (no packing, no padding_free)."
        )


def start_on_prompt_cache(
    backbone: nn.Module, call: SplicedCall, slots: int, layer: InputTuningLayer, site: Backbone
) -> bool:
    """The short way at inference: the prompt's keys and values are known, only the caller's tokens run."""
    given = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    cache, positions = call.get("past_key_values"), call.get("position_ids")
    fits = given is not None and (site.max_positions is None or slots + given.shape[1] <= site.max_positions)
    if not fits or site.slack == "right":
        return False
    layout = put_prompt_into_cache(backbone, call, given.shape[0], slots, layer, site.has_window)
    if layout is None:
        return False
    cached = CachedPrompt(layout, first_position=None if positions is None else positions[:, :1])
    setattr(cache, MARK_ON_CACHE, cached)
    continue_after_prompt(call, cache, cached, layer, site)
    return True


def start_with_prompt(
    backbone: nn.Module, call: SplicedCall, slots: int, layer: InputTuningLayer, site: Backbone
) -> None:
    """Rewrites a call that starts a sequence: embeddings, mask, token types and positions get the virtual tokens."""
    ids, x = call.get("input_ids"), call.get("inputs_embeds")
    if (ids is None) == (x is None):
        return  # the backbone's own error says it best
    given = ids if x is None else x
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
    positions = given_positions
    if positions is None:
        positions = default_positions(backbone, ids, x, layout, site)
    if positions is not None:
        call["position_ids"] = layout.join_positions(positions.to(device))
    call["attention_mask"] = layout.join_mask(mask, batch, length)
    refuse_too_long(call, slots + length, slots, site)
    # What the caller passed as inputs_embeds came out of `get_input_embeddings()`, our layer: it is adapted already.
    x = layer(ids) if x is None else x
    call["input_ids"] = None
    if types is not None and site.adds_token_types:
        x = x + layer.base_layer(types)
        call["token_type_ids"] = None
    elif types is not None:
        types = types.expand(batch, -1).to(device)
        call["token_type_ids"] = layout.join(types.new_zeros(batch, slots), types)
    call["inputs_embeds"] = layout.to(x.device).join(layer.prompt_rows(batch, slots), x)
    call.cached = CachedPrompt(layout, first_position=None if given_positions is None else given_positions[:, :1])


def refuse_mixed_lengths(backbone: nn.Module, site: Backbone) -> None:
    if site.slack == "right" and "past_key_values" in site.parameters:
        raise ValueError(
            f"`adapter_names`: {type(backbone).__name__} numbers positions by their place in the row, so adapters with "
            "prompts of different lengths cannot share a batch. Use adapters of one length, or one batch each."
        )


def default_positions(
    backbone: nn.Module, ids: Tensor | None, x: Tensor | None, layout: PromptLayout, site: Backbone
) -> Tensor | None:
    """The positions that the backbone would use, where it would not find them by itself any more: RoBERTa counts along
    the ids that are not padding, and slack moves the places of a mixed batch. None where it still finds them."""
    if site.position_owner is not None:
        owner = backbone.get_submodule(site.position_owner)
        if ids is not None:
            return owner.create_position_ids_from_input_ids(ids, owner.padding_idx)
        return owner.create_position_ids_from_inputs_embeds(x, owner.padding_idx)
    if layout.lengths is None or site.positions_from_mask or "position_ids" not in site.parameters:
        return None
    length = (ids if x is None else x).shape[1]
    return torch.arange(length, device=layout.lengths.device).unsqueeze(0)


def refuse_too_long(call: SplicedCall, total: int, slots: int, site: Backbone) -> None:
    """`total` places are more than the table of positions has; pads may share a position, so look closer then."""
    if site.max_positions is None or total <= site.max_positions:
        return
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    if not torch.compiler.is_compiling():
        if positions is not None and int(positions.max()) - site.first_position < site.max_positions:
            return
        if positions is None and site.positions_from_mask and mask is not None:
            if int(mask.sum(dim=-1).max()) <= site.max_positions:
                return
    raise ValueError(
        f"The input has {total - slots} tokens and the prompt {slots} virtual tokens, together {total}, but the model "
        f"has only {site.max_positions} positions. Shorten the input to {site.max_positions - slots} tokens, or use a "
        "smaller `num_virtual_tokens`."
    )


def add_token_types(call: SplicedCall, layer: InputTuningLayer, site: Backbone) -> None:
    """GPT-2 looks token types up in the word embedding, where they would pass through the input-adapter: look them up
    in the base embedding here instead."""
    types = call.get("token_type_ids")
    if types is None or not site.adds_token_types or layer.disable_adapters:
        return
    x = layer(call["input_ids"]) if call.get("inputs_embeds") is None else call["inputs_embeds"]
    call.update(input_ids=None, inputs_embeds=x + layer.base_layer(types), token_type_ids=None)


def continue_after_prompt(
    call: SplicedCall, cache: Any, cached: CachedPrompt, layer: InputTuningLayer, site: Backbone
) -> None:
    """Rewrites a call whose cache holds the prompt: only the mask and the positions have to know of it."""
    new = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if new is None:
        return
    batch, length = new.shape[:2]
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    layout = cached.layout.repeated(batch)
    past = cache.get_seq_length() - layout.slots
    refuse_expanded_mask(mask)
    if mask is not None:
        refuse_full_ids(cache, mask.shape[1], length)
        if site.has_window and length > 1:
            refuse_pads_behind_prompt(mask, layout)
    elif positions is not None:
        refuse_gap(positions, past, length, cached)
    if positions is not None:
        call["position_ids"] = layout.shift_positions(positions)
    elif layout.lengths is not None and "position_ids" in site.parameters and not site.positions_from_mask:
        at = torch.arange(past, past + length, device=new.device).unsqueeze(0)
        call["position_ids"] = layout.shift_positions(at)
    call["attention_mask"] = layout.join_mask(mask, batch, past + length)
    refuse_too_long(call, layout.slots + past + length, layout.slots, site)
    add_token_types(call, layer, site)


CONTINUE = (
    "To continue on a returned cache, pass only the new tokens as `input_ids`, and an `attention_mask` over the cached "
    "and the new tokens together: given all ids, `generate` would cut them by the length of the cache, which counts "
    "the virtual tokens too. An assistant model is called that way, so its adapter must have num_virtual_tokens=0."
)


def refuse_full_ids(cache: Any, mask_length: int | None, length: int) -> None:
    """`mask_length` places of mask for `length` new tokens on a cache of ours; shared with `InputTuningModel.generate`."""
    slots = getattr(cache, MARK_ON_CACHE).layout.slots
    past = cache.get_seq_length() - slots
    if mask_length != past + length:
        got = "is missing" if mask_length is None else f"has {mask_length} places"
        raise ValueError(
            f"`attention_mask` {got}, but the cache holds {past} tokens (and {slots} virtual ones) and {length} more "
            f"are passed. {CONTINUE}"
        )


def refuse_pads_behind_prompt(mask: Tensor, layout: PromptLayout) -> None:
    """A first chunk of nothing but pads got its prompt before all of the row's pads were there. Masks and positions
    make up for that, a window that counts places does not."""
    if layout.pads is not None and (count_left_pads(mask) > layout.pads).any():
        raise ValueError(
            "`prefill_chunk_size` is smaller than the left padding of a row, and this model's attention has a sliding "
            "window, which would lose the prompt. Use larger chunks, or batch rows of similar length."
        )


def refuse_gap(positions: Tensor, past: int, length: int, cached: CachedPrompt) -> None:
    """Without a mask the positions tell whether the new tokens follow the cached ones."""
    if torch.compiler.is_compiling():
        return
    first = 0 if cached.first_position is None else cached.first_position
    message = f"`position_ids` do not go on where the cache ends, at {past} tokens. {CONTINUE}"
    follows = (positions[:, :1] == first + past).all()
    if length == 1 and positions.is_cuda:
        torch._assert_async(follows, message)  # a step of decoding, where waiting for the answer would cost time
    elif not follows:
        raise ValueError(message)


def _wants_tuple(module: nn.Module, call: dict[str, Any]) -> bool:
    return_dict = call.get("return_dict")
    return not (module.config.return_dict if return_dict is None else return_dict)


def take_prompt_out(backbone: nn.Module, args: tuple, call: dict[str, Any], output: Any, *, site: Backbone):
    """Post-hook of the backbone."""
    if not isinstance(call, SplicedCall) or call.cached is None:
        return None
    layout = call.cached.layout
    cache = getattr(output, "past_key_values", None)
    if cache is not None:
        setattr(cache, MARK_ON_CACHE, call.cached)
    if not layout.slots:
        return None
    if not site.feeds_decoder:
        output.last_hidden_state = layout.remove(output.last_hidden_state)
    for name, dim in (("hidden_states", 1), ("attentions", -2)):
        states = getattr(output, name, None)
        if states is not None:
            # Attention maps keep their virtual columns: that is what the tokens looked at.
            setattr(output, name, tuple(layout.remove(state, dim) for state in states))
    if getattr(output, "pooler_output", None) is not None:  # BERT pools the first place, which was a virtual token
        output.pooler_output = backbone.pooler(output.last_hidden_state)
    return output.to_tuple() if call.as_tuple else output


# ---- the hooks around an encoder-decoder model's decoder -----------------------------------------------------------


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
    length = length - rows.slots if mask is None else mask.shape[1]
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
            f"`attention_mask` has {length} places for {hidden.shape[1]} places of the encoder's output. The mask must "
            f"fit the input, without the virtual tokens ({', '.join(map(str, known))})."
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
    given = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if hidden is not None and given is not None and call.get("encoder_outputs") is None:
        layout = encoder_layout(hidden, call.get("attention_mask"), given.shape[1], layer, site)
        if layout is not None:
            output.encoder_last_hidden_state = layout.remove(hidden)
    return output.to_tuple() if call.as_tuple else output


# ---- installing and removing ---------------------------------------------------------------------------------------

_PRE_HOOKS = (put_prompt_in, show_prompt_to_decoder, ask_for_named_outputs)
_POST_HOOKS = (take_prompt_out, take_prompt_out_of_encoder_output)


def install_hooks(model: nn.Module, backbone_path: str, embedding_path: str) -> None:
    """Puts the hooks on a model whose embedding is wrapped; does nothing where they are there already."""
    backbone = model.get_submodule(backbone_path)
    if _our_hooks(backbone._forward_pre_hooks, _PRE_HOOKS):
        return
    site = describe_backbone(model, backbone_path, embedding_path)
    layer = find_layer(backbone, site)
    backbone.register_forward_pre_hook(partial(put_prompt_in, site=site), with_kwargs=True)
    backbone.register_forward_hook(partial(take_prompt_out, site=site), with_kwargs=True)
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


def _our_hooks(hooks: dict[int, Callable], functions: tuple[Callable, ...]) -> list[int]:
    return [key for key, hook in hooks.items() if isinstance(hook, partial) and hook.func in functions]

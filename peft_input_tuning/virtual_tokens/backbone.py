"""The backbone of a model: the module that consumes the word embeddings, and what the hooks have to know of it.

LlamaModel, GPT2Model, OPTDecoder, BertModel, the encoder of T5 and BART. Found through `get_encoder` and
`get_input_embeddings`, never by the size of a parameter: heads and position tables can have the vocabulary's.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import NoneType
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..base_weights import base_embedding
from ..layer import InputTuningLayer
from .cache_mark import cache_name
from .trial_run import plain_ids, unchanged, weights_are_here

# Arguments for what other models have a cache for; transformers' ALL_CACHE_NAMES are these and `CACHE_NAMES`.
_STATES = ("cache_params", "state", "mems", "past_buckets_states")
# A method of the module that counts positions along the ids, for calls with embeddings.
_FROM_EMBEDDINGS = "create_position_ids_from_inputs_embeds"
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")


@dataclass(frozen=True)
class Backbone:
    """What the hooks have to know of a backbone; plain values, so that it can be pickled and compiled.

    Args:
        embedding: path of the wrapped embedding inside the backbone.
        parameters: names of the arguments of its `forward`.
        cache: which of them is the cache; it has the same name in the output. None if it has none.
        feeds_decoder: whether a decoder reads its output, so that virtual places stay in the last hidden state.
        slack: where unused slots of a mixed batch go, see `layout.py`.
        positions_from_mask: whether positions that are not passed are counted along the mask (OPT).
        padding_id: of a model that counts positions along the ids which are not padding (RoBERTa), or None.
        first_position: the position of a row's first token (RoBERTa starts after the padding's).
        loses_left_pads: whether positions are counted so, and cannot be passed instead (M2M100).
        max_positions: rows of its table of absolute positions, or None.
        is_causal: whether its attention looks back only.
        has_window: whether attention sees only the nearest places (Mistral, Gemma).
        adds_token_types: whether token types go through the word embedding (GPT-2).
    """

    embedding: str
    parameters: tuple[str, ...]
    cache: str | None = None
    feeds_decoder: bool = False
    slack: str = "left"
    positions_from_mask: bool = False
    padding_id: int | None = None
    first_position: int = 0
    loses_left_pads: bool = False
    max_positions: int | None = None
    is_causal: bool = False
    has_window: bool = False
    adds_token_types: bool = False


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def consumes_embeddings(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and "inputs_embeds" in forward_parameters(module)


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    for path, module in model.named_modules(remove_duplicate=False):
        if module is wanted:
            return path
    raise ValueError(f"{type(wanted).__name__} is not a part of {type(model).__name__}.")


def find_backbone(model: nn.Module, needs_place: bool = True) -> tuple[str | None, str]:
    """Paths of the backbone in the model and of the word embedding in the backbone.

    Without `needs_place` a model may have no backbone (None, and the embedding's path in the model): an adapter
    without virtual tokens needs the embedding alone. Of an encoder-decoder nothing would tell which part reads it.

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
    if not needs_place and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None, path
    raise ValueError(
        f"No part of {type(model).__name__} around its embedding `{path}` takes `inputs_embeds`, so there is no place "
        "for virtual tokens. Input-tuning needs a model of transformers that accepts `inputs_embeds`, or "
        "num_virtual_tokens=0."
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
            f"{type(embedding).__name__}. Input-tuning needs a text model of transformers, or, with "
            "num_virtual_tokens=0, any module whose `get_input_embeddings()` gives its nn.Embedding."
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
    padding_id = owner.padding_idx if hasattr(owner, _FROM_EMBEDDINGS) else None
    first_position = 0 if padding_id is None else padding_id + 1
    return Backbone(
        embedding=embedding_path,
        parameters=parameters,
        cache=cache_name(parameters),
        feeds_decoder=find_decoder(model, backbone) is not None,
        slack="right" if by_place else "left",
        positions_from_mask=backbone.config.model_type == "opt",  # the table of BioGPT could, but is never left to
        padding_id=padding_id,
        first_position=first_position,
        loses_left_pads=hasattr(table, _FROM_EMBEDDINGS),
        max_positions=_max_positions(table, first_position),
        is_causal=is_causal(backbone),
        has_window=has_window(backbone),
        # XLNet has its table in the backbone as GPT-2 does, and looks types up elsewhere.
        adds_token_types="token_type_ids" in parameters and owner is backbone and not _state_argument(backbone),
    )


def _state_argument(backbone: nn.Module) -> str | None:
    """The argument in which a model keeps a past that has no length; None if it has none.

    Since transformers 5.24 state-space models call theirs a cache, too: one without a layer of attention, or of a
    class of its own (xLSTM).
    """
    parameters = inspect.signature(type(backbone).forward).parameters
    name = cache_name(parameters)
    if name is None:
        return next((name for name in parameters if name in _STATES), None)
    kinds = [one for one in get_args(parameters[name].annotation) if inspect.isclass(one) and one is not NoneType]
    kinds = [one for one in kinds if one.__module__ != "builtins"]
    without_length = bool(kinds) and not any(hasattr(one, "get_seq_length") for one in kinds)
    layers = DynamicCache(config=backbone.config).is_linear
    return name if without_length or (layers and all(layers)) else None


def refuse_models_without_place(
    backbone: nn.Module, embedding: nn.Module, virtual_tokens: int, input_only: bool
) -> None:
    """Raises ValueError where a prompt would be lost or put in again and again, or output be taken for input.

    Args:
        embedding: of words, `(batch, length)` ids → `(batch, length, embedding_dim)`.
        virtual_tokens: of the adapter.
        input_only: whether it leaves the output's tokens alone.
    """
    if not virtual_tokens and not input_only:
        return
    state = _state_argument(backbone)
    if state is not None:
        why = f"keeps its past in `{state}`, as a state without a length: a generated token looks like a text's start"
    elif getattr(backbone.config, "hidden_size_per_layer_input", None):
        why = "looks up each token's id in every layer, and would get embeddings instead of ids"
    elif virtual_tokens and _treats_ids_otherwise(backbone, embedding):
        why = "does more with ids than look up their embeddings (it may scale them), and would get embeddings"
    else:
        return
    what = f"`num_virtual_tokens` is {virtual_tokens}" if virtual_tokens else '`adapter_scope` is "input"'
    raise ValueError(f'{what}, but {type(backbone).__name__} {why}. Use num_virtual_tokens=0 and adapter_scope="all".')


@torch.no_grad()
def _treats_ids_otherwise(backbone: nn.Module, embedding: nn.Module) -> bool:
    """Whether two ids give another output than their embeddings: in Marian and Pegasus, which scale what they look up
    and take embeddings as they are. Read off a run, since others scale both. False where weights are elsewhere."""
    if not weights_are_here(backbone):
        return False
    ids = plain_ids(backbone, embedding, 2)
    settings: dict[str, Any] = {"return_dict": True}
    if "use_cache" in forward_parameters(backbone):
        settings["use_cache"] = False
    with unchanged(backbone):
        try:
            expected = backbone(input_ids=ids, **settings).last_hidden_state
            found = backbone(inputs_embeds=embedding(ids), **settings).last_hidden_state
        except Exception:  # it wants more than ids, or no embeddings: its own error says so at the first call
            return False
    return not torch.allclose(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()), equal_nan=True)


def is_causal(backbone: nn.Module) -> bool:
    """Whether its attention looks back only."""
    return any(getattr(module, "is_causal", False) is True for module in backbone.modules())


def has_window(backbone: nn.Module) -> bool:
    """Whether attention sees only the nearest places."""
    return any(getattr(backbone.config, name, None) for name in _WINDOWS)


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

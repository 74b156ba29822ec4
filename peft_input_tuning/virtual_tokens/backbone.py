"""The backbone of a model: the module in which masks and positions are made, and what a call has to know of it.

LlamaModel, GPT2Model, OPTDecoder, BertModel, the encoder of T5 and BART; of a model that takes images too, the module
under its head (Gemma3Model, Qwen2VLModel), where images get their places. Found through `get_encoder`,
`get_input_embeddings` and `base_model`, never by the size of a parameter: heads and position tables can have the
vocabulary's.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base_weights import base_embedding
from ..layer import InputTuningLayer
from .cache_mark import cache_name

# A method of the module that counts positions along the ids, for calls with embeddings.
_FROM_EMBEDDINGS = "create_position_ids_from_inputs_embeds"
_MORE = {"inputs_embeds", "attention_mask"}
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")


@dataclass(frozen=True)
class BackboneTraits:
    """What a call has to know of a backbone; plain values, so that it can be pickled and compiled.

    Args:
        embedding: path of the wrapped embedding inside the backbone; None if the module around it looks ids up.
        parameters: names of the arguments of its `forward`.
        cache: which of them is the cache; it has the same name in the output. None if it has none.
        feeds_decoder: whether a decoder reads its output, so that virtual places stay in the last hidden state.
        slack: where unused slots of a mixed batch go, see `layout.py`.
        position_table: path in the backbone, which takes no positions, of a table that does (BART); None if none does.
        positions_from_mask: whether positions that are not passed are counted along the mask (OPT).
        padding_id: of a model that counts positions along the ids which are not padding (RoBERTa), or None.
        first_position: the position of a row's first token (RoBERTa starts after the padding's).
        max_positions: rows of its table of absolute positions, or None.
        is_causal: whether its attention looks back only.
        has_window: whether attention sees only the nearest places (Mistral, Gemma).
        adds_token_types: whether token types go through the word embedding (GPT-2).
        length_first: whether it looks ids up as `(length, batch)` (XLNet); None if that is not known.
        takes_embeddings: whether embeddings give what their ids give; None if that is not known.
        honours_mask: whether masked places change nothing beside them; None if that is not known.
        needs_token_types: whether that holds for calls with token types only (PaliGemma).
        masks_on_cache: whether it holds for calls on a cache (not GIT's); None if that is not known.
        fills_cache: whether a cache that does not come back in the output goes on; None if that is not known.
    """

    embedding: str | None
    parameters: tuple[str, ...]
    cache: str | None = None
    feeds_decoder: bool = False
    slack: str = "left"
    position_table: str | None = None
    positions_from_mask: bool = False
    padding_id: int | None = None
    first_position: int = 0
    max_positions: int | None = None
    is_causal: bool = False
    has_window: bool = False
    adds_token_types: bool = False
    length_first: bool | None = None
    takes_embeddings: bool | None = None
    honours_mask: bool | None = None
    needs_token_types: bool = False
    masks_on_cache: bool | None = None
    fills_cache: bool | None = None


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward; with `**kwargs`, those of its parent class too."""
    found: dict[str, None] = {}
    for part in type(module).__mro__:
        if "forward" in vars(part):
            parameters = list(inspect.signature(vars(part)["forward"]).parameters.values())[1:]
            named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
            found |= dict.fromkeys(one.name for one in named)
            if len(named) == len(parameters):
                break
    return tuple(found)


def takes_ids(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and "input_ids" in forward_parameters(module)


def reads_ids(module: nn.Module) -> bool:
    """Whether a module of transformers goes from ids to hidden states: no head is a part of it."""
    if not isinstance(module, PreTrainedModel) or not takes_ids(module):
        return False
    return not module.can_generate() and module.get_output_embeddings() is None


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    for path, module in model.named_modules(remove_duplicate=False):
        if module is wanted:
            return path
    raise ValueError(f"{type(wanted).__name__} is not a part of {type(model).__name__}.")


def find_embedding(model: nn.Module, of_encoder: bool = True) -> str:
    """Path of the word embedding in the model; of an encoder-decoder model, the encoder's.

    `of_encoder=False` is for models around one that look ids up themselves (Florence-2).

    Raises:
        ValueError: the model has no token embedding.
    """
    encoder = _encoder(model)
    owner = model if encoder is None or not of_encoder else encoder
    embedding = _embedding_of(owner)
    if embedding is None and (tower := text_tower(model)) is not None:
        owner, embedding = tower, _embedding_of(tower)
    table = base_embedding(embedding)
    if not isinstance(getattr(table, "weight", None), Tensor) or not hasattr(table, "num_embeddings"):
        raise ValueError(
            f"{type(model).__name__} has no token embedding: `get_input_embeddings()` gave "
            f"{type(embedding).__name__}. Give input-tuning a model with one, or the part that has it."
        )
    return ".".join(filter(None, ("" if owner is model else path_of(model, owner), path_of(owner, embedding))))


def _embedding_of(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def text_tower(model: nn.Module) -> nn.Module | None:
    """The part that reads text, of a model that compares texts with images or sound (CLIP, SigLIP, CLAP). The whole
    may name no word embedding, and gives no hidden states; `get_decoder` gives the part that does."""
    if not hasattr(getattr(model, "base_model", model), "get_text_features"):
        return None
    tower = model.get_decoder()
    return tower if tower is not model and reads_ids(tower) else None


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model, which reads its input."""
    encoder = not_compiled(model.get_encoder()) if hasattr(model, "get_encoder") else None
    if encoder is None or encoder is model or not takes_ids(encoder) or encoder.can_generate():
        return None  # BLIP-2 gives its language model
    base = getattr(model, "base_model", None)
    return None if encoder is not_compiled(base) else encoder  # a compiled backbone gives itself


def not_compiled(module: Any) -> Any:
    """What `torch.compile` has put a module of its own around; anything else as it is."""
    return getattr(module, "_orig_mod", module)


def find_backbone(model: nn.Module, embedding_path: str) -> str | None:
    """Path of the backbone in the model; None if nothing around the embedding reads ids, or if an encoder-decoder
    model has no encoder that does. Whisper's decoder by itself has the configuration of the whole."""
    encoder = _encoder(model)
    if encoder is not None:
        return path_of(model, encoder)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and decoder is not model:
        return None
    candidates = _around(model, embedding_path)
    if not candidates:
        return None
    innermost, base = candidates[0], getattr(model, "base_model", None)
    if text_tower(model) is not None:
        return innermost
    under_head = next((path for path in candidates if model.get_submodule(path) is not_compiled(base)), innermost)
    more = {*forward_parameters(model.get_submodule(under_head))}
    more -= {*forward_parameters(model.get_submodule(innermost))}
    return under_head if more else innermost  # it takes images, say, and gives them their places


def _around(model: nn.Module, embedding_path: str) -> list[str]:
    """Paths of the modules around an embedding that go from ids to hidden states, the innermost first."""
    paths = [embedding_path]
    while paths[-1]:
        paths.append(paths[-1].rpartition(".")[0])
    found = [path for path in paths[1:] if reads_ids(model.get_submodule(path))]
    # Embeddings may be looked up in a module of their own, which reads ids, too: a backbone takes more.
    return [path for path in found if _MORE.intersection(forward_parameters(model.get_submodule(path)))]


def find_innermost(model: nn.Module, embedding_path: str) -> str | None:
    """Path of the smallest module around an embedding that goes from ids to hidden states; None if there is none."""
    return next(iter(_around(model, embedding_path)), None)


def find_decoder(model: nn.Module, backbone: nn.Module) -> str | None:
    """Path of the decoder that reads the backbone's output; None if there is none."""
    decoder = model
    while isinstance(decoder, nn.Module) and backbone in decoder.modules():  # Florence-2 gives both first
        inner = not_compiled(decoder.get_decoder()) if hasattr(decoder, "get_decoder") else None
        if inner is decoder:
            return None
        decoder = inner
    if not isinstance(decoder, nn.Module) or decoder in backbone.modules():
        return None
    return path_of(model, decoder) if "encoder_hidden_states" in forward_parameters(decoder) else None


def describe_backbone(model: nn.Module, backbone_path: str, embedding_path: str) -> BackboneTraits:
    """Reads off a model what a call needs to know; called before the embedding is wrapped or after."""
    backbone = model.get_submodule(backbone_path)
    innermost = next(
        (path for path in _around(model, embedding_path) if path.startswith(backbone_path)), backbone_path
    )
    text = model.get_submodule(innermost)  # without the encoder of images or sound
    parameters = (*forward_parameters(backbone), *forward_parameters(text))  # the outer one hands arguments on
    parameters = tuple(dict.fromkeys(parameters))
    prefix = f"{backbone_path}." if backbone_path else ""
    inside = embedding_path.removeprefix(prefix) if embedding_path.startswith(prefix) else None
    owner = backbone if inside is None else backbone.get_submodule(inside.rpartition(".")[0])
    table = next((m for p, m in text.named_modules() if _is_position_table(p)), None)
    counting = next((one for one in (owner, table) if hasattr(one, _FROM_EMBEDDINGS)), None)  # RoBERTa, M2M100
    padding_id = None if counting is None else counting.padding_idx
    by_place = table is not None and "position_ids" not in parameters and counting is None
    first_position = 0 if padding_id is None else padding_id + 1
    return BackboneTraits(
        embedding=inside,
        parameters=parameters,
        cache=cache_name(parameters),
        feeds_decoder=find_decoder(model, backbone) is not None,
        slack="right" if by_place else "left",
        position_table=path_of(backbone, table) if by_place and "position_ids" in forward_parameters(table) else None,
        positions_from_mask=backbone.config.model_type == "opt",  # the table of BioGPT could, but is never left to
        padding_id=padding_id,
        first_position=first_position,
        max_positions=_max_positions(table, first_position),
        is_causal=is_causal(text),
        has_window=has_window(text),
        # XLNet has its table in the backbone as GPT-2 does, and looks types up elsewhere.
        adds_token_types="token_type_ids" in parameters and owner is backbone and "mems" not in parameters,
    )


def is_causal(backbone: nn.Module) -> bool:
    """Whether its attention looks back only."""
    return any(getattr(module, "is_causal", False) is True for module in backbone.modules())


def has_window(backbone: nn.Module) -> bool:
    """Whether attention sees only the nearest places, in any layer."""
    config = backbone.config.get_text_config()
    counted = isinstance(getattr(config, "num_hidden_layers", None), int)  # LXMERT has three numbers
    layers = list(getattr(config, "per_layer_config", ())) if counted else []
    layers = layers or [config]
    return any(getattr(layer, name, None) for layer in layers for name in _WINDOWS)


def _is_position_table(path: str) -> bool:
    return path.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings")


def _max_positions(table: nn.Module | None, first_position: int) -> int | None:
    if not isinstance(table, nn.Embedding):
        return None
    return table.num_embeddings - first_position - getattr(table, "offset", 0)  # OPT and BART keep rows for an offset


def check_has_place(model: nn.Module, backbone_path: str | None, embedding_path: str, num_virtual_tokens: int) -> None:
    """Raises ValueError if virtual tokens would be lost, or put in again and again."""
    if not num_virtual_tokens:
        return
    if backbone_path is None:
        decoder = path_of(model, model.get_decoder()) if hasattr(model, "get_decoder") else ""
        reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
        if not reads_text and decoder and embedding_path.startswith(f"{decoder}."):
            raise ValueError(
                f"`num_virtual_tokens` is {num_virtual_tokens}, but the input of {type(model).__name__} is no text: "
                f"the embedding is that of its decoder. Give input-tuning the decoder (`model.{decoder} = "
                f"get_peft_model(model.{decoder}, config)`), or use num_virtual_tokens=0."
            )
        raise ValueError(
            f"`num_virtual_tokens` is {num_virtual_tokens}, but no part of {type(model).__name__} around its "
            f"embedding `{embedding_path}` goes from `input_ids` to hidden states, so there is no place for them. Use "
            "num_virtual_tokens=0, or a model of transformers whose backbone does."
        )
    backbone = model.get_submodule(backbone_path)
    if _encoder(model) is backbone and model.can_generate() and find_decoder(model, backbone) is None:
        raise ValueError(
            f"`num_virtual_tokens` is {num_virtual_tokens}, but nothing tells how {type(model).__name__} reads the "
            f"output of its {type(backbone).__name__}: virtual tokens might be lost. Use num_virtual_tokens=0."
        )


def check_embedding(backbone: nn.Module, traits: BackboneTraits) -> None:
    """Raises ValueError if the wrapped embedding is not in its place any more."""
    if traits.embedding is not None:
        embedding = backbone.get_submodule(traits.embedding)
        if not isinstance(embedding, InputTuningLayer):
            refuse_changed_embedding(backbone, traits.embedding, embedding)


def refuse_changed_embedding(backbone: nn.Module, path: str, now: nn.Module) -> NoReturn:
    raise ValueError(
        f"The embedding `{path}` of {type(backbone).__name__} was resized, replaced or wrapped after "
        f"input-tuning was added: it is a {type(now).__name__} now, and the input-adapter would be left out. "
        "Resize the embedding, or add other adapters to it, before input-tuning."
    )

"""Where input-tuning goes in a model: its word embedding and its backbone, and what does not let it go there.

All of it is found and checked before anything is changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from .base_weights import base_embedding, check_can_be_saved, keep_unpacked
from .call_state import BASE
from .config import InputTuningConfig
from .layer import InputTuningLayer
from .virtual_tokens.backbone import (
    check_has_place,
    describe_backbone,
    find_backbone,
    find_embedding,
    refuse_changed_embedding,
    text_tower,
)
from .virtual_tokens.install import check_can_be_installed
from .virtual_tokens.scope import tells_input_from_output
from .virtual_tokens.trial import WhatSeesIds, what_sees_ids

MAX_HIDDEN_RATIO = 64  # an input-adapter wider than this many embeddings is a mistake, not a choice


@dataclass(frozen=True)
class Placement:
    """Where an adapter goes in a model.

    Args:
        model: without `PeftModel`s around it.
        embedding_path: of its word embedding, wrapped or not.
        backbone_path: of its backbone; None if there is no place for virtual tokens.
        seen: what a run of it has shown; nothing if it has an adapter already.
    """

    model: nn.Module
    embedding_path: str
    backbone_path: str | None
    seen: WhatSeesIds = field(default_factory=WhatSeesIds)

    @property
    def embedding(self) -> nn.Module:
        return self.model.get_submodule(self.embedding_path)

    @property
    def backbone(self) -> nn.Module | None:
        return None if self.backbone_path is None else self.model.get_submodule(self.backbone_path)


def place_of(model: nn.Module, config: InputTuningConfig) -> Placement:
    """Finds the place of an adapter; a model without one is run for that.

    Args:
        model: without `PeftModel`s around it.
        config: of the adapter.

    Raises:
        ValueError: the model has no place for it, or the configuration does not fit.
    """
    path = find_embedding(model)
    place = Placement(model, path, find_backbone(model, path))
    if not isinstance(place.embedding, InputTuningLayer) and holds_our_layer(place.embedding):
        refuse_changed_embedding(model, path, place.embedding)
    known = next((path for path, one in model.named_modules() if isinstance(one, InputTuningLayer)), None)
    if known is not None:
        place = replace(place, embedding_path=known)
    check_can_be_saved(base_embedding(place.embedding))
    _check_sizes(config, place)
    check_has_place(model, place.backbone_path, place.embedding_path, config.num_virtual_tokens)
    keep_unpacked(model)  # before the model is run
    if known is None:
        check_can_be_installed(model, place.backbone_path)
        place = _run(place)
    _check_what_was_seen(config, place)
    return place


def _run(place: Placement) -> Placement:
    """The encoder of an encoder-decoder model looks its input up, or the model around it does (Florence-2)."""
    model, backbone = place.model, place.backbone
    for of_encoder in (True, False):
        path = find_embedding(model, of_encoder)
        where: tuple[str, int] = ("left", 0)
        if place.backbone_path is not None:
            traits = describe_backbone(model, place.backbone_path, path)
            where = traits.slack, traits.first_position
        reader = text_tower(model) or model  # the whole of CLIP wants an image, too
        seen = what_sees_ids(reader, backbone, model.get_submodule(path), *where)
        if seen.embedding is not False:
            backbone_path = None if seen.gives_hidden_states is False else place.backbone_path
            return Placement(model, path, backbone_path, seen)
    raise ValueError(
        f"{type(model).__name__} does not ask its word embedding `{place.embedding_path}` for the embeddings of its "
        "input, so an input-adapter around it would never run. Give input-tuning the part of the model that does."
    )


def _check_what_was_seen(config: InputTuningConfig, place: Placement) -> None:
    check_has_place(place.model, place.backbone_path, place.embedding_path, config.num_virtual_tokens)
    name = type(place.backbone).__name__
    if config.num_virtual_tokens and place.seen.makes_numbers:
        raise ValueError(
            f"`num_virtual_tokens` is {config.num_virtual_tokens}, but {name} makes numbers of ids (hashes) and looks "
            "them up; virtual tokens have no ids. Use num_virtual_tokens=0."
        )
    known = getattr(place.backbone, "input_tuning_traits", place.seen)
    input_only = config.adapter_scope == "input" and tells_input_from_output(place.model)
    if input_only and known.takes_embeddings is False:
        raise ValueError(
            f'`adapter_scope` is "input", but {name} does more with ids than look up their embeddings (it may scale '
            'them), and would get embeddings. Use adapter_scope="all".'
        )


def holds_our_layer(module: nn.Module) -> bool:
    return any(isinstance(inner, InputTuningLayer) for inner in module.modules())


def check_adapter_name(name: str) -> None:
    """Adapters are parts of containers, in which some names mean something else."""
    if name.startswith("__"):
        raise ValueError(
            f"`adapter_name` is {name!r}, but names with two underscores in front are kept: {BASE!r} is no adapter. "
            "Choose another."
        )
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"`adapter_name` is {name!r}, which cannot name a part of a module: it is empty, has a dot, or means "
            "something else there. Choose another."
        )


def check_modules_to_save(config: InputTuningConfig, model: nn.Module, embedding_path: str) -> None:
    """Also T5's `shared` and a decoder's embedding: they hold the weight that the input-adapter wraps."""
    weight = base_embedding(model.get_submodule(embedding_path)).weight
    embeddings = [
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if hasattr(module, "num_embeddings") and getattr(module, "weight", None) is weight
    ]
    for name in config.modules_to_save or []:
        if any(path.endswith(name) for path in (embedding_path, *embeddings)):
            raise ValueError(
                f"`modules_to_save` names {name!r}, which is the word embedding that the input-adapter wraps. Remove "
                "it: the adapter changes the embeddings of all tokens already."
            )


def _check_sizes(config: InputTuningConfig, place: Placement) -> None:
    backbone, width = place.backbone, base_embedding(place.embedding).embedding_dim
    settings = None if backbone is None else backbone.config.get_text_config()
    max_positions = getattr(settings, "max_position_embeddings", None) or 0
    if 0 < max_positions <= config.num_virtual_tokens:
        raise ValueError(
            f"`num_virtual_tokens` is {config.num_virtual_tokens}, but the model has {max_positions} positions in "
            "all. Use a shorter prompt; 5 to 200 virtual tokens are usual."
        )
    if (config.adapter_hidden_dim or 0) > MAX_HIDDEN_RATIO * width:
        raise ValueError(
            f"`adapter_hidden_dim` is {config.adapter_hidden_dim}, more than {MAX_HIDDEN_RATIO} times the embedding "
            f"size {width}. The paper uses 2 times; leave it at None for that."
        )

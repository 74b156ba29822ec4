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
    find_innermost,
    refuse_changed_embedding,
    text_tower,
)
from .virtual_tokens.install import check_can_be_installed
from .virtual_tokens.scope import tells_input_from_output
from .virtual_tokens.trial import WhatSeesIds, what_sees_ids
from .virtual_tokens.trial_run import weights_are_here

TASKS_WITH_A_NEW_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
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
    for of_encoder in (True, False):
        found = _seen(replace(place, embedding_path=find_embedding(place.model, of_encoder)))
        if found.seen.embedding is not False:
            return found
    raise ValueError(
        f"{type(place.model).__name__} does not ask its word embedding `{place.embedding_path}` for the embeddings of "
        "its input, so an input-adapter around it would never run. Give input-tuning the part of the model that does."
    )


def _seen(place: Placement) -> Placement:
    """A place with what a run shows of it. A backbone that wants more than ids (Voxtral realtime: sound for each of
    them) leaves the virtual tokens to the text model inside, which gets them in front of all that comes."""
    model, path, backbone_path = place.model, place.embedding_path, place.backbone_path
    traits = None if backbone_path is None else describe_backbone(model, backbone_path, path)
    reader = text_tower(model) or model  # the whole of CLIP wants an image, too
    seen = what_sees_ids(reader, place.backbone, place.embedding, traits)
    inner = find_innermost(model, path)
    goes_inside = backbone_path is not None and inner not in (None, backbone_path) and weights_are_here(model)
    if seen.embedding is None and goes_inside:
        return _seen(replace(place, backbone_path=inner))
    return replace(place, backbone_path=None if seen.gives_hidden_states is False else backbone_path, seen=seen)


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


def add_unnamed_head(config: InputTuningConfig, model: nn.Module) -> None:
    """Adds a new head that is to be trained to `modules_to_save`, if PEFT does not know its name.

    For some tasks PEFT adds the names "classifier" and "score", or "qa_outputs". T5 and BART call theirs
    `classification_head`. A head is what a model has beside its base model.
    """
    if config.task_type not in TASKS_WITH_A_NEW_HEAD or not config.modules_to_save or config.inference_mode:
        return
    base = getattr(model, "base_model", model)
    beside = {name: part for name, part in model.named_children() if part is not base}
    heads = [name for name, part in beside.items() if next(part.parameters(), None) is not None]
    parts = [path for path, _ in model.named_modules() if path.partition(".")[0] in heads]
    if not any(path.endswith(name) for path in parts for name in config.modules_to_save):
        config.modules_to_save = [*config.modules_to_save, *heads]


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

"""Which modules of a model get more than their class, and giving them their class back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ..layer import InputTuningLayer
from ..modules import VIRTUAL
from .backbone import describe_backbone, find_decoder
from .encoder_decoder import HidesPrompt, SeesPrompt
from .entrance import Entrance, GeneratingEntrance, MakesCaches
from .position_table import PositionTable
from .subclass import Extension, check_can_be_extended, extend, unextend
from .trial import WhatSeesIds, first_argument
from .trial_run import pad_id
from .with_prompt import WithPrompt

ATTRIBUTES = (
    "input_tuning_traits",
    "input_tuning_layer",
    "input_tuning_ids",
    "input_tuning_backbone",
    "input_tuning_around",
)


class SeesIds(Extension):
    """A module beside the word embedding that gets ids: virtual tokens are padding to it."""

    input_tuning_ids: tuple[int | str, int]  # which of its arguments they are, and the padding's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        where, pad = self.input_tuning_ids
        ids = kwargs[where] if isinstance(where, str) else args[where]
        ids = None if ids is None else torch.where(ids < VIRTUAL, pad, ids)  # of a call with embeddings there are none
        if isinstance(where, str):
            kwargs[where] = ids
        else:
            args = (*args[:where], ids, *args[where + 1 :])
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class GivenEmbeddings(Extension):
    """A part of the backbone that is given embeddings, with the prompt among them. Whoever calls it with ids goes
    past the place where the prompt is put in front."""

    input_tuning_layer: tuple[InputTuningLayer]
    input_tuning_around: str  # the class of the backbone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if first_argument(args, kwargs) is not None and self.input_tuning_layer[0].slots:
            raise ValueError(
                f"{type(self).__name__} was called by itself, and virtual tokens are put in front of `input_ids` in "
                f"the {self.input_tuning_around} around it. Call that, or the whole model; or give the adapter to "
                "this part: get_peft_model(part, config)."
            )
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def check_can_be_installed(model: nn.Module, backbone_path: str | None) -> None:
    """Raises ValueError if a module has a `forward` of its own, which calls would go through instead."""
    for module, extension in _extensions(model, backbone_path):
        check_can_be_extended(module, extension)


def install(model: nn.Module, backbone_path: str | None, embedding_path: str, seen: WhatSeesIds) -> None:
    """Extends the modules of a model whose embedding is wrapped; does nothing if they are extended already.

    Args:
        model: the model that callers call.
        backbone_path: of its backbone; None if there is no place for virtual tokens.
        embedding_path: of the wrapped embedding.
        seen: what a run of the model has shown.
    """
    if isinstance(model, Entrance):
        return
    layer = model.get_submodule(embedding_path)
    for module, extension in _extensions(model, backbone_path):
        module.input_tuning_layer = (layer,)  # in a tuple, or it would be a part of the module
        extend(module, extension)
    if backbone_path is not None:
        backbone = model.get_submodule(backbone_path)
        traits = seen.added_to(describe_backbone(model, backbone_path, embedding_path))
        if traits.position_table is not None:
            extend(backbone.get_submodule(traits.position_table), PositionTable)
        for module in model.modules():
            if isinstance(module, WithPrompt | SeesPrompt | HidesPrompt | Entrance):
                module.input_tuning_traits = traits
        model.input_tuning_backbone = backbone_path
        pad = pad_id(backbone)
        for module, where in seen.others:
            module.input_tuning_ids = (where, pad)
            extend(module, SeesIds)
        for module in seen.given_embeddings:
            module.input_tuning_layer, module.input_tuning_around = (layer,), type(backbone).__name__
            extend(module, GivenEmbeddings)


def _extensions(model: nn.Module, backbone_path: str | None) -> list[tuple[nn.Module, type[Extension]]]:
    """What each module gets; of two for one module, the later is called first."""
    found: list[tuple[nn.Module, type[Extension]]] = []
    if backbone_path is not None:
        parts = backbone_path.split(".")[:-1]
        parents = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1)]
        found += [(one, MakesCaches) for one in parents if isinstance(one, GenerationMixin) and one is not model]
        backbone = model.get_submodule(backbone_path)
        found.append((backbone, WithPrompt))
        decoder_path = find_decoder(model, backbone)
        if decoder_path is not None:
            found.append((model.get_submodule(decoder_path), SeesPrompt))
            found += [(parent, HidesPrompt) for parent in parents if isinstance(parent, PreTrainedModel)]
    found.append((model, GeneratingEntrance if isinstance(model, GenerationMixin) else Entrance))
    return found


def uninstall(model: nn.Module) -> None:
    """Gives all modules of a model their classes back."""
    for module in model.modules():
        if isinstance(module, Extension):
            unextend(module)
            for name in ATTRIBUTES:
                module.__dict__.pop(name, None)

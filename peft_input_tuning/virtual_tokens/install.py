"""Which modules of a model get more than their class, and giving them their class back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from ..layer import InputTuningLayer
from .backbone import describe_backbone, find_decoder, has_window
from .encoder_decoder import HidesPrompt, SeesPrompt
from .entrance import Entrance, GeneratingEntrance
from .subclass import Extension, extend, unextend
from .trial import WhatSeesIds
from .with_prompt import WithPrompt

ATTRIBUTES = ("input_tuning_traits", "input_tuning_layer", "input_tuning_encoder", "input_tuning_window")


class SeesIds(Extension):
    """A table beside the word embedding that is asked by ids: virtual tokens are padding to it."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        pad = self.padding_idx or 0  # type: ignore[attr-defined]
        return super().forward(torch.where(input < 0, pad, input), *args, **kwargs)  # type: ignore[misc]


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
    assert isinstance(layer, InputTuningLayer)
    if backbone_path is not None:
        backbone = model.get_submodule(backbone_path)
        backbone.input_tuning_traits = describe_backbone(model, backbone_path, embedding_path, seen.takes_embeddings)
        extend(backbone, WithPrompt)
        _install_around_decoder(model, backbone_path, layer)
        for table in seen.others:
            extend(table, SeesIds)
        model.input_tuning_window = has_window(backbone)
    model.input_tuning_layer = (layer,)
    extend(model, GeneratingEntrance if isinstance(model, GenerationMixin) else Entrance)


def _install_around_decoder(model: nn.Module, backbone_path: str, layer: InputTuningLayer) -> None:
    backbone = model.get_submodule(backbone_path)
    decoder_path = find_decoder(model, backbone)
    if decoder_path is None:
        return
    decoder, parent = model.get_submodule(decoder_path), model.get_submodule(backbone_path.rpartition(".")[0])
    for module, extension in ((decoder, SeesPrompt), (parent, HidesPrompt)):
        module.input_tuning_encoder = (layer, backbone.input_tuning_traits.slack)
        extend(module, extension)


def uninstall(model: nn.Module) -> None:
    """Gives all modules of a model their classes back."""
    for module in model.modules():
        if isinstance(module, Extension):
            unextend(module)
            for name in ATTRIBUTES:
                module.__dict__.pop(name, None)

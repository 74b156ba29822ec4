"""A model of transformers with another number of words: which of its tensors grow, and its class without weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..virtual_tokens.backbone import find_decoder
from ..virtual_tokens.subclass import class_of


def vocabulary_names(base: nn.Module, state: dict[str, Tensor], table_name: str) -> list[str]:
    """Tensors beside the wrapped table that have a place for every word: heads, their biases, tied tables."""
    words = state[table_name].shape[0]
    shared = {state[table_name].data_ptr()}
    head = base.get_output_embeddings()
    if head is not None:
        shared.add(head.weight.data_ptr())
        if getattr(head, "bias", None) is not None:
            shared.add(head.bias.data_ptr())
    if getattr(base, "final_logits_bias", None) is not None:  # BART
        shared.add(base.final_logits_bias.data_ptr())
    return [
        key
        for key, value in state.items()
        if key != table_name and value.data_ptr() in shared and words in value.shape
    ]


def empty_model(base: nn.Module, rows: int, untie: bool = True) -> nn.Module:
    """The class of the base without weights, with the new vocabulary. With `untie`, a decoder's head is untied from
    its table; an encoder-decoder model keeps its ties, since a table of the encoder's own is part of the format."""
    config = copy.deepcopy(base.config)
    config.get_text_config().vocab_size = rows  # of a model of images and text, that of the text
    if hasattr(config, "quantization_config"):  # of the GGUF file
        del config.quantization_config
    if untie and find_decoder(base, base.get_encoder()) is None:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        plain = class_of(base)(config)
    if base.can_generate():
        plain.generation_config = copy.deepcopy(base.generation_config)
    return plain


def suppress(config: GenerationConfig, virtual_ids: Sequence[int]) -> None:
    config.suppress_tokens = sorted({*(config.suppress_tokens or []), *virtual_ids})

"""The first values of a soft prompt: vocabulary rows, a text, or random numbers; as in PEFT's prompt-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft.tuners.prompt_tuning import PromptTuningInit
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from .modules import base_embedding

if TYPE_CHECKING:
    from .config import InputTuningConfig


def initial_prompt(config: InputTuningConfig, embedding: nn.Module) -> Tensor:
    """The soft prompt that training starts from (the paper's: embeddings of random vocabulary tokens).

    The values come out of `embedding(ids)`, not from rows of its weight: some models scale their embeddings (Gemma,
    BART), and offloaded weights are only there while the module runs.

    Args:
        config: the adapter's configuration.
        embedding: the base model's word embedding, `(n,)` ids → `(n, embedding_dim)`.

    Returns:
        `(num_virtual_tokens, embedding_dim)`, float32, no gradient.
    """
    count, table = config.num_virtual_tokens, base_embedding(embedding)
    if config.prompt_tuning_init == PromptTuningInit.RANDOM:
        return torch.randn(count, table.embedding_dim)
    if config.prompt_tuning_init == PromptTuningInit.TEXT:
        ids = _text_ids(config)
    else:
        ids = torch.randint(0, table.num_embeddings, (count,))
    with torch.no_grad(), gather_params_ctx(embedding.parameters()):
        return embedding(ids.to(execution_device(embedding))).float()


def execution_device(embedding: nn.Module) -> torch.device:
    """Where an embedding runs. The weight of an offloaded one is on "meta" between calls (accelerate's `_hf_hook`)."""
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)


def _text_ids(config: InputTuningConfig) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ValueError(
            f"`prompt_tuning_init_text` {config.prompt_tuning_init_text!r} has no tokens. Pass a longer text."
        )
    repeats = -(-config.num_virtual_tokens // len(ids))
    return torch.tensor((ids * repeats)[: config.num_virtual_tokens])

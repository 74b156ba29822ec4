"""The first values of a soft prompt: vocabulary rows, a text, or random numbers; as in PEFT's prompt-tuning."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.prompt_tuning import PromptTuningInit
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from .base_weights import base_embedding, execution_device


def start_words(
    embedding: nn.Module,
    num_virtual_tokens: int,
    init: PromptTuningInit | str,
    text: str | None = None,
    tokenizer_name: str | None = None,
    tokenizer_kwargs: dict[str, Any] | None = None,
) -> list[int] | None:
    """The words that a soft prompt starts from (the paper's: random tokens of the vocabulary), by id.

    Args:
        embedding: the base model's word embedding.
        num_virtual_tokens: number of words.
        init: "SAMPLE_VOCAB", "TEXT" or "RANDOM".
        text: of "TEXT"; cut or repeated to `num_virtual_tokens`.
        tokenizer_name: folder or hub id of the tokenizer of "TEXT".
        tokenizer_kwargs: further arguments of `AutoTokenizer.from_pretrained`.

    Returns:
        `num_virtual_tokens` ids; None for "RANDOM".
    """
    if init == PromptTuningInit.RANDOM:
        return None
    if init == PromptTuningInit.TEXT:
        return _text_ids(num_virtual_tokens, text, tokenizer_name, tokenizer_kwargs)
    return torch.randint(0, base_embedding(embedding).num_embeddings, (num_virtual_tokens,)).tolist()


def initial_prompt(embedding: nn.Module, num_virtual_tokens: int, words: list[int] | None) -> Tensor:
    """The soft prompt that training starts from.

    The values come out of `embedding(ids)`, not from rows of its weight: some models scale their embeddings (Gemma,
    BART), and offloaded weights are only there while the module runs.

    Args:
        embedding: the base model's word embedding, `(n,)` ids → `(n, embedding_dim)`.
        num_virtual_tokens: number of rows.
        words: their ids, of `start_words`; None for random numbers.

    Returns:
        `(num_virtual_tokens, embedding_dim)`, float32, no gradient.
    """
    if words is None:
        return torch.randn(num_virtual_tokens, base_embedding(embedding).embedding_dim)
    with torch.no_grad(), gather_params_ctx(embedding.parameters()):
        return embedding(torch.tensor(words, device=execution_device(embedding))).float()


def _text_ids(
    count: int, text: str | None, tokenizer_name: str | None, tokenizer_kwargs: dict[str, Any] | None
) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, **(tokenizer_kwargs or {}))
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError(f"`prompt_tuning_init_text` {text!r} has no tokens. Pass a longer text.")
    repeats = -(-count // len(ids))
    return (ids * repeats)[:count]

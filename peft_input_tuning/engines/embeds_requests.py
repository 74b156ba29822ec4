"""Requests with embeddings in place of token ids: vLLM's `prompt_embeds`, offline and over HTTP.

What adapters with `adapter_scope="input"` need: their input is adapted here, and what the engine writes behind it gets
the base's embeddings. The engine serves the untouched base model, and each request may have an adapter of its own.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..prompt_embeds import prompt_embeds


def embeds_prompts(
    model: nn.Module, rows: Iterable[Sequence[int]], adapter_name: str | None = None
) -> list[dict[str, Tensor]]:
    """Returns prompts for `vllm.LLM(..., enable_prompt_embeds=True).generate`.

    Args:
        model: a `PeftModel`, or a model with an adapter of transformers.
        rows: token ids of each input, without padding; of any lengths.
        adapter_name: the adapter; None is the active one.

    Returns:
        `{"prompt_embeds": (num_virtual_tokens + length, dim)}` for each row, on the CPU, in the dtype of the base's
        embeddings, which has to be the engine's.

    Raises:
        ValueError: what `prompt_embeds` raises.
    """
    return [
        {"prompt_embeds": prompt_embeds(model, torch.tensor([list(row)], dtype=torch.long), adapter_name)[0].cpu()}
        for row in rows
    ]


def embeds_base64(embeds: Tensor) -> str:
    """Returns embeddings as vLLM's HTTP server takes them: `extra_body={"prompt_embeds": ...}` of a completion.

    Args:
        embeds: `(length, dim)`, a `prompt_embeds` of `embeds_prompts`.
    """
    file = io.BytesIO()
    torch.save(embeds.detach().cpu().contiguous().clone(), file)
    return base64.b64encode(file.getvalue()).decode("ascii")

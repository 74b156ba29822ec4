"""What an adapter puts into its model, as tensors: the prompt, and the prompt with the adapted input behind it.

    soft_prompt      (P, dim)                  the virtual tokens
    prompt_embeds    (batch, P + length, dim)  [virtual tokens ; T(E[input_ids])]

Given to the untouched base model as `inputs_embeds`, or to an engine that takes embeddings (vLLM's `prompt_embeds`),
the second does what the adapter does with `input_ids`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base_weights import execution_device
from .layer import InputTuningLayer, named_layer

# What PEFT's `get_prompt` and `get_prompt_embedding_to_save`, and scripts for prompt-tuning, read off a model. It is
# refused and not answered: a `PeftModel` for prompt-tuning around this one looks for it with `hasattr`.
OF_PROMPT_TUNING = ("prompt_encoder", "prompt_tokens")
INSTEAD_OF_PROMPT_TUNING = (
    "input-tuning has no `{name}`, and so no `get_prompt` and `get_prompt_embedding_to_save`. Call "
    "peft_input_tuning.soft_prompt(model, adapter_name) for the prompt, or "
    "peft_input_tuning.prompt_embeds(model, input_ids, adapter_name) for the prompt and the adapted input behind it."
)


def soft_prompt(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """Returns an adapter's virtual tokens as its model sees them (paper, figure 2), with their gradient.

    Args:
        model: a `PeftModel`, or a model with an adapter of transformers.
        adapter_name: the adapter; None is the active one.

    Returns:
        `(num_virtual_tokens, embedding_dim)`, in the dtype of the adapter; no rows if it has no virtual tokens.

    Raises:
        ValueError: a model without input-tuning, an unknown adapter, or one that waits for its file.
    """
    layer, name = _adapter_of(model, adapter_name)
    if not layer.prompt_length(name):
        return torch.empty(0, layer.embedding_dim, device=execution_device(layer.base_layer))
    return layer.input_tuning_prompt[name]()


@torch.no_grad()
def prompt_embeds(model: nn.Module, input_ids: Tensor, adapter_name: str | None = None) -> Tensor:
    """Returns `[prompt ; T(e)]`, the embeddings that the base model gets for an input (paper, figures 2 and 4).

    All of `input_ids` is input, and adapted, with `adapter_scope="input"` too. What an engine writes behind it gets
    the base's embeddings, which is right for `adapter_scope="input"`; with "all" the engine must adapt it, or use a
    table that `export_model` has written. There is no dropout and no gradient.

    Args:
        model: a `PeftModel`, or a model with an adapter of transformers.
        input_ids: `(batch, length)`, rows without padding: pads would be words like others. Rows of different lengths
            go one by one.
        adapter_name: the adapter; None is the active one.

    Returns:
        `(batch, num_virtual_tokens + length, embedding_dim)`, in the dtype of the base model's embeddings.

    Raises:
        ValueError: a model without input-tuning, an unknown adapter, one that waits for its file, or `input_ids` of
            another shape.
    """
    layer, name = _adapter_of(model, adapter_name)
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(
            f"`input_ids` must be a tensor of token ids, (batch, length), got {got}. For one row pass "
            "torch.tensor([ids])."
        )
    embeddings = layer.unadapted(input_ids.to(execution_device(layer.base_layer)))
    adapted = layer.plain_adapter(name)(embeddings)  # without dropout, in the dtype of the embeddings
    prompt = soft_prompt(model, name).to(adapted).expand(len(adapted), -1, -1)
    return torch.cat([prompt, adapted], dim=1)


def _adapter_of(model: nn.Module, adapter_name: str | None) -> tuple[InputTuningLayer, str]:
    _, layer = named_layer(model)
    name = layer.enabled_adapter if adapter_name is None else adapter_name
    if name is None or not layer.has_adapter(name):
        what = "None and no adapter is active" if name is None else f"{name!r}, which is not known"
        raise ValueError(f"`adapter_name` is {what}. Name one of {sorted(layer.adapter_names)}.")
    layer.check_weights_have_come(name)
    return layer, name

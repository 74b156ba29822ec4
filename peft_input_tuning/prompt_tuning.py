"""From PEFT's prompt-tuning and P-tuning to input-tuning: a trained soft prompt becomes an adapter's start."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.p_tuning import PromptEncoderConfig
from peft.tuners.prompt_tuning import PromptTuningConfig, PromptTuningInit
from torch import Tensor

from .config import InputTuningConfig
from .layer import named_layer


def from_prompt_tuning(prompt_tuned: PeftModel, adapter_name: str | None = None, **changes: Any) -> PeftModel:
    """A new `PeftModel` on the same base whose prompt is the trained one; with W2 = 0 it gives the same logits.

    Args:
        prompt_tuned: a `PeftModel` with a PROMPT_TUNING or P_TUNING adapter; the latter's prompt is what its encoder
            makes. It shares its base model with the result and should not be used any more.
        adapter_name: the adapter to take; None is the active one.
        **changes: fields of `InputTuningConfig`, for example `adapter_hidden_dim=64`.

    Raises:
        ValueError: another kind of adapter, a prompt for the decoder too, or a changed `num_virtual_tokens`.
    """
    if not isinstance(prompt_tuned, PeftModel):
        raise ValueError(
            f"`prompt_tuned` must be a PeftModel, got {type(prompt_tuned).__name__}. Load the adapter with "
            "PeftModel.from_pretrained."
        )
    name = adapter_name or prompt_tuned.active_adapter
    config = prompt_tuned.peft_config.get(name)
    if type(config) not in (PromptTuningConfig, PromptEncoderConfig):  # subclasses have more than a prompt (multitask)
        raise ValueError(
            f"Adapter {name!r} must be a PROMPT_TUNING or P_TUNING adapter, got {type(config).__name__}. "
            f"Adapters of this model: {sorted(prompt_tuned.peft_config)}."
        )
    prompt = _trained_prompt(prompt_tuned, name)
    if len(prompt) != config.num_virtual_tokens:
        raise ValueError(
            f"Adapter {name!r} has {len(prompt)} virtual tokens for encoder and decoder together. Input-tuning has a "
            "prompt for the encoder only. Train with num_transformer_submodules=1 to convert the prompt."
        )
    if changes.get("num_virtual_tokens", len(prompt)) != len(prompt):
        raise ValueError(
            f"`num_virtual_tokens` must stay {len(prompt)}, the length of the trained prompt, got "
            f"{changes['num_virtual_tokens']}."
        )
    changes = {"prompt_tuning_init": PromptTuningInit.RANDOM, "tokenizer_kwargs": None, **changes}
    model = get_peft_model(
        prompt_tuned.get_base_model(), InputTuningConfig.from_prompt_tuning(config, **changes), adapter_name=name
    )
    _, layer = named_layer(model)
    layer.input_tuning_prompt[name].start_from(prompt)
    layer.record_start(name, None)  # where the other prompt started is not known
    return model


@torch.no_grad()
def _trained_prompt(prompt_tuned: PeftModel, name: str) -> Tensor:
    """What PEFT's `get_prompt` gives in inference, `(virtual tokens, dim)`: P-tuning computes its prompt with an LSTM
    or MLP in training, and keeps the result alone in files."""
    encoder = prompt_tuned.prompt_encoder[name]
    if prompt_tuned.peft_config[name].inference_mode:
        return encoder.embedding.weight.clone()
    training = encoder.training
    encoder.eval()  # the LSTM may have dropout
    try:
        return encoder(prompt_tuned.prompt_tokens[name].to(encoder.embedding.weight.device)[None])[0].clone()
    finally:
        encoder.train(training)

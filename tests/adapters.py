"""Making adapters in tests: never left at identity."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from families import Family, build
from oracles import adapter_weights
from peft_input_tuning import InputTuningConfig

SIZES = {"num_virtual_tokens": 4, "adapter_hidden_dim": 24}


def config(family: Family | None = None, **changes: Any) -> InputTuningConfig:
    task = {} if family is None else {"task_type": family.task_type}
    return InputTuningConfig(**{**SIZES, "init_weights": False, **task, **changes})


def randomize(model: nn.Module, name: str = "default", scale: float = 0.3, seed: int = 1) -> None:
    """Gives an adapter weights that matter: prompt and W2 of the size of the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        parts = key.split(".")
        if len(parts) > 2 and parts[-2] == name and parts[-3].startswith("input_tuning_"):
            values = torch.randn(parameter.shape, generator=generator) * scale
            if parts[-3].endswith("prompt"):
                values /= model.peft_config[name].prompt_scale
            parameter.data.copy_(values)


def adapted(family: Family, head: str = "lm", seed: int = 1, **changes: Any) -> tuple[PeftModel, nn.Module, dict]:
    """A model with an adapter, its untouched base, and the adapter's weights for the oracles."""
    base = build(family, head).requires_grad_(False)  # kernels may differ where gradients are wanted
    model = get_peft_model(build(family, head), config(family, **changes)).eval()
    randomize(model, seed=seed)
    return model, base, adapter_weights(model)


def add(model: PeftModel, name: str, seed: int, **changes: Any) -> dict:
    """Adds one more adapter; returns its weights for the oracles."""
    family_task = model.peft_config["default"].task_type
    model.add_adapter(name, config(task_type=family_task, **changes))
    randomize(model, name, seed=seed)
    return adapter_weights(model, name)

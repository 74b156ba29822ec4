"""Two learning rates: a soft prompt wants about ten times the input-adapter's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .layer import named_layer

PROMPT_LR_RATIO = 10.0


def input_tuning_parameter_groups(
    model: nn.Module, lr: float, prompt_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups of the trainable parameters of a model with input-tuning adapters.

    Args:
        model: the model, for example a `PeftModel`.
        lr: learning rate of the input-adapter and of everything else that trains (`modules_to_save`).
        prompt_lr: learning rate of the soft prompts; None is 10 x `lr`.
        weight_decay: of the adapter's group; prompts are never decayed towards zero.

    Returns:
        Up to two groups, named "adapter" and "prompt"; a group without parameters is left out.

    Raises:
        ValueError: a rate that is not positive, a model without input-tuning, or nothing to train.
    """
    prompt_lr = PROMPT_LR_RATIO * lr if prompt_lr is None else prompt_lr
    for name, value in (("lr", lr), ("prompt_lr", prompt_lr)):
        if not value > 0:
            raise ValueError(f"`{name}` must be > 0, got {value}.")
    prompts = {id(parameter) for parameter in named_layer(model)[1].input_tuning_prompt.parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "name": "adapter",
            "params": [p for p in trainable if id(p) not in prompts],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {"name": "prompt", "params": [p for p in trainable if id(p) in prompts], "lr": prompt_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            "`model` has no trainable parameters. Load the adapter with `is_trainable=True`, or activate one with "
            "`set_adapter`."
        )
    return groups


def create_input_tuning_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    lr: float,
    prompt_lr: float | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer in which the soft prompt and the input-adapter learn at different rates.

    For `Trainer(optimizers=(optimizer, None))`, which makes its scheduler, or for a loop of your own.

    Args:
        model: the model, for example a `PeftModel`.
        optimizer_cls: for example `torch.optim.AdamW`.
        lr: learning rate of the input-adapter.
        prompt_lr: learning rate of the soft prompt; None is 10 x `lr`.
        weight_decay: of the input-adapter.
        **kwargs: further arguments of `optimizer_cls`.
    """
    return optimizer_cls(input_tuning_parameter_groups(model, lr, prompt_lr, weight_decay), lr=lr, **kwargs)

"""Two learning rates of a user's choice: one for the soft prompt, one for the input-adapter.

One rate for all is right without this file: `prompt_scale` makes Adam move the prompt that many times as fast.
"""

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

    `prompt_lr` is the rate of the prompt as the model sees it. The optimizer has its parameter, the prompt divided by
    `prompt_scale`, so that the group's rate is `prompt_lr / prompt_scale`. That is exact for Adam and others whose
    steps do not depend on the size of the gradient. In plain SGD a step of the prompt is `prompt_scale * prompt_lr *
    gradient`: the parameter's gradient is larger by the scale too. Train with `prompt_scale=1` there.

    Args:
        model: the model, for example a `PeftModel`.
        lr: learning rate of the input-adapter and of everything else that trains (`modules_to_save`).
        prompt_lr: learning rate of the soft prompts; None is 10 x `lr`.
        weight_decay: of the adapter's group; prompts are never decayed towards zero.

    Returns:
        A group named "adapter", and one named "prompt" for each `prompt_scale` among the adapters, as a rule one; a
        group without parameters is left out.

    Raises:
        ValueError: a rate that is not positive, a model without input-tuning, or nothing to train.
    """
    prompt_lr = PROMPT_LR_RATIO * lr if prompt_lr is None else prompt_lr
    for name, value in (("lr", lr), ("prompt_lr", prompt_lr)):
        if not value > 0:
            raise ValueError(f"`{name}` must be > 0, got {value}.")
    scales = {id(prompt.weight): prompt.scale for prompt in named_layer(model)[1].input_tuning_prompt.values()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapter = [parameter for parameter in trainable if id(parameter) not in scales]
    groups = [{"name": "adapter", "params": adapter, "lr": lr, "weight_decay": weight_decay}]
    for scale in dict.fromkeys(scales.values()):
        prompts = [parameter for parameter in trainable if scales.get(id(parameter)) == scale]
        groups.append({"name": "prompt", "params": prompts, "lr": prompt_lr / scale, "weight_decay": 0.0})
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
        prompt_lr: learning rate of the soft prompt as the model sees it; None is 10 x `lr`. The optimizer shows
            `prompt_lr / prompt_scale`, see `input_tuning_parameter_groups`.
        weight_decay: of the input-adapter.
        **kwargs: further arguments of `optimizer_cls`.
    """
    return optimizer_cls(input_tuning_parameter_groups(model, lr, prompt_lr, weight_decay), lr=lr, **kwargs)

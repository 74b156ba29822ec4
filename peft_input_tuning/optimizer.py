"""Two learning rates of a user's choice: one for the soft prompt, one for the input-adapter.

One rate for all is right without this file: `prompt_scale` makes Adam move the prompt that many times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.optim import Optimizer

from .layer import InputTuningLayer, named_layer

PROMPT_LR_RATIO = 10.0
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def parameters_of_adapters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """All parameters of each input-tuning adapter: prompt, input-adapter, and its copies of `modules_to_save`."""
    layer = named_layer(model)[1]
    found = {name: [p for _, p in layer.named_adapter_parameters(name)] for name in layer.adapter_names}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name in found.keys() & module.modules_to_save.keys():
                found[name] += module.modules_to_save[name].parameters()
    return found


def input_tuning_parameter_groups(
    model: nn.Module,
    lr: float | Mapping[str, float],
    prompt_lr: float | Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups of the trainable parameters of a model with input-tuning adapters.

    `prompt_lr` is the rate of the prompt as the model sees it. The optimizer has its parameter, the prompt divided by
    `prompt_scale`, so that the group's rate is `prompt_lr / prompt_scale`. That is exact for Adam and others whose
    steps do not depend on the size of the gradient. In plain SGD a step of the prompt is `prompt_scale * prompt_lr *
    gradient`: the parameter's gradient is larger by the scale too. Train with `prompt_scale=1` there.

    Args:
        model: the model, for example a `PeftModel`.
        lr: learning rate of the input-adapter and of everything else that trains (`modules_to_save`); or a rate for
            each adapter that trains, `{"a": 3e-3, "b": 1e-3}`.
        prompt_lr: learning rate of the soft prompts, one or one for each adapter; None is 10 x `lr`.
        weight_decay: of the adapter's group; prompts are never decayed towards zero.

    Returns:
        A group named "adapter", and one named "prompt" for each `prompt_scale` among the adapters, as a rule one; a
        group without parameters is left out. With a rate for each adapter these are groups of each, and have its name
        as "adapter_name".

    Raises:
        ValueError: a rate that is not positive, a model without input-tuning, nothing to train, or rates for other
            adapters than those that train.
    """
    layer = named_layer(model)[1]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not isinstance(lr, Mapping):
        if isinstance(prompt_lr, Mapping):
            raise ValueError("`prompt_lr` has a rate for each adapter, and `lr` one for all. Pass `lr` the same way.")
        groups = _groups(layer, trainable, lr, prompt_lr, weight_decay)
    else:
        wanted = {id(parameter) for parameter in trainable}
        own = {name: [p for p in every if id(p) in wanted] for name, every in parameters_of_adapters(model).items()}
        _check_names("lr", lr, [name for name, parameters in own.items() if parameters])
        if isinstance(prompt_lr, Mapping):
            _check_names("prompt_lr", prompt_lr, list(lr))
        groups = []
        for name, rate in lr.items():
            of_prompt = prompt_lr[name] if isinstance(prompt_lr, Mapping) else prompt_lr
            more = _groups(layer, own[name], rate, of_prompt, weight_decay)
            groups += [{**group, "adapter_name": name} for group in more]
    if not groups:
        raise ValueError(
            "`model` has no trainable parameters. Load the adapter with `is_trainable=True`, or activate one with "
            "`set_adapter`."
        )
    return groups


def _check_names(argument: str, rates: Mapping[str, float], trained: list[str]) -> None:
    odd = [name for name in rates if name not in trained] or [name for name in trained if name not in rates]
    if odd:
        raise ValueError(
            f"`{argument}` has rates for {sorted(rates)}, and the adapters that train are {sorted(trained)}: "
            f"{odd[0]!r} is in one of them only. Pass one rate for each adapter that trains, and have them train with "
            "model.set_requires_grad([...])."
        )


def _groups(
    layer: InputTuningLayer,
    parameters: list[nn.Parameter],
    lr: float,
    prompt_lr: float | None,
    weight_decay: float,
) -> list[dict[str, Any]]:
    prompt_lr = PROMPT_LR_RATIO * lr if prompt_lr is None else prompt_lr
    for name, value in (("lr", lr), ("prompt_lr", prompt_lr)):
        if not value > 0:
            raise ValueError(f"`{name}` must be > 0, got {value}.")
    scales = {id(prompt.weight): prompt.scale for prompt in layer.input_tuning_prompt.values()}
    adapter = [parameter for parameter in parameters if id(parameter) not in scales]
    groups = [{"name": "adapter", "params": adapter, "lr": lr, "weight_decay": weight_decay}]
    for scale in dict.fromkeys(scales.values()):
        prompts = [parameter for parameter in parameters if scales.get(id(parameter)) == scale]
        groups.append({"name": "prompt", "params": prompts, "lr": prompt_lr / scale, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def create_input_tuning_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., AnyOptimizer],
    lr: float | Mapping[str, float],
    prompt_lr: float | Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> AnyOptimizer:
    """An optimizer in which the soft prompt and the input-adapter learn at different rates.

    For `Trainer(optimizers=(optimizer, None))`, which makes its scheduler, or for a loop of your own.

    Args:
        model: the model, for example a `PeftModel`.
        optimizer_cls: for example `torch.optim.AdamW`.
        lr: learning rate of the input-adapter, or a rate for each adapter by its name.
        prompt_lr: learning rate of the soft prompt as the model sees it, or one for each adapter; None is 10 x `lr`.
            The optimizer shows `prompt_lr / prompt_scale`, see `input_tuning_parameter_groups`.
        weight_decay: of the input-adapter.
        **kwargs: further arguments of `optimizer_cls`.
    """
    groups = input_tuning_parameter_groups(model, lr, prompt_lr, weight_decay)
    return optimizer_cls(groups, lr=groups[0]["lr"], **kwargs)  # each group has a rate of its own

"""A weighted sum of adapters as one adapter, exactly: `prompt = Σ wᵢ · promptᵢ` and `T(x) = x + Σ wᵢ · (Tᵢ(x) − x)`.

    "linear"  Tᵢ(x) − x is linear in W2: with one W1 for all, W2 = Σ wᵢ · W2ᵢ
    "cat"     each Tᵢ keeps its own hidden units: W1 = [W1₁ ; W1₂ ; …], W2 = [w₁ · W2₁ , w₂ · W2₂ , …]

What neither of them does exactly is refused, never approximated. (Prompts are averaged as rows; what a model makes of
an average is another matter.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from peft.tuners.prompt_tuning import PromptTuningInit
from torch import Tensor

from .config import InputTuningConfig
from .layer import InputTuningLayer

COMBINATION_TYPES = ("linear", "cat")
INSTEAD = "Give each row of a batch its adapter with `adapter_names=[...]`, or train adapters that agree."


def add_weighted_adapter(
    tuner: Any, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
) -> None:
    """Adds an adapter that is exactly the weighted sum of others, as the method of PEFT's LoRA does.

    Args:
        tuner: an `InputTuningModel`, of which this is a method.
        adapters: their names; prompts of one length, one activation, one scope, biases in all or in none.
        weights: a number for each of them, negative ones too.
        adapter_name: the new adapter's name. It is not activated.
        combination_type: "linear" for adapters of equal W1 (or without input-adapter); "cat" puts their hidden units
            beside each other.

    Raises:
        ValueError: adapters whose sum is no adapter; names the difference, and nothing is added.
    """
    check_arguments(tuner.peft_config, adapters, weights, adapter_name, combination_type)
    config, values = weighted_adapter(tuner.layer, tuner.peft_config, adapters, weights, combination_type)
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except BaseException:
        del tuner.peft_config[adapter_name]
        raise
    for key, parameter in tuner.layer.named_adapter_parameters(adapter_name):
        parameter.data = values[key]


def check_arguments(
    configs: dict[str, InputTuningConfig], adapters: list[str], weights: list[float], name: str, combination_type: str
) -> None:
    """Checks what `add_weighted_adapter` was given, without a look at the adapters' weights.

    Raises:
        ValueError: names the argument, the value, and what to do.
    """
    if name in configs:
        raise ValueError(f"`adapter_name` {name!r} is in use. Choose another, or delete_adapter({name!r}) first.")
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(
            f"`combination_type` must be one of {list(COMBINATION_TYPES)}, got {combination_type!r}: others would not "
            "be exact."
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"`adapters` has {len(adapters)} names and `weights` has {len(weights)}. Pass a weight for each adapter."
        )
    for adapter in adapters:
        if adapter not in configs:
            raise ValueError(f"`adapters` has the unknown name {adapter!r}. Known: {sorted(configs)}.")
        if configs[adapter].modules_to_save:
            raise ValueError(
                f"`adapters` has {adapter!r}, which has trained {configs[adapter].modules_to_save} too, and modules "
                f"are not added up. {INSTEAD}"
            )
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"`weights` must be finite numbers, got {weight!r}.")


@torch.no_grad()
def weighted_adapter(
    layer: InputTuningLayer,
    configs: dict[str, InputTuningConfig],
    adapters: list[str],
    weights: list[float],
    combination_type: str,
) -> tuple[InputTuningConfig, dict[str, Tensor]]:
    """Works the sum of adapters out.

    Args:
        layer: the wrapped embedding.
        configs: the configurations of its adapters.
        adapters: the adapters to add up.
        weights: a number for each of them.
        combination_type: "linear" or "cat".

    Returns:
        The sum's configuration, and its parameters under the names of `layer.named_adapter_parameters`.

    Raises:
        ValueError: adapters whose sum is no adapter; names the field, the values, and what to do.
    """
    for name in adapters:
        layer.check_weights_have_come(name)
    pairs = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.input_tuning_fc1]
    adapting = [name for name, _ in pairs]  # T(x) - x of the others is 0
    _check_same("num_virtual_tokens", {name: layer.prompt_length(name) for name in adapters})
    _check_same("adapter_activation", {name: configs[name].adapter_activation for name in adapting})
    _check_same("adapter_bias", {name: configs[name].adapter_bias for name in adapting})
    _check_same("adapter_scope", {name: "input" if name in layer.input_only else "all" for name in adapting})
    first = (adapting or adapters)[0]
    values = {}
    if layer.prompt_length(first):
        prompts = [layer.input_tuning_prompt[name]() for name in adapters]
        values["input_tuning_prompt.weight"] = _sum(prompts, weights) / layer.input_tuning_prompt[first].scale
    if pairs:
        parameters = [({k: v.detach() for k, v in layer.named_adapter_parameters(name)}, w) for name, w in pairs]
        values.update(_input_adapter(parameters, adapting, combination_type))
    config = replace(
        configs[first],
        prompt_start=None,  # a sum of prompts started from no words
        adapter_hidden_dim=len(values["input_tuning_fc1.weight"]) if pairs else 0,
        prompt_tuning_init=PromptTuningInit.RANDOM,  # it starts from nothing that a tokenizer would be read for
        prompt_tuning_init_text=None,
        tokenizer_name_or_path=None,
        tokenizer_kwargs=None,
        weights_in_checkpoint=False,
    )
    config.inference_mode = False
    return config, values


def _input_adapter(
    parameters: list[tuple[dict[str, Tensor], float]], names: list[str], combination_type: str
) -> dict[str, Tensor]:
    """W1 and W2 of the sum, their biases, and what the activation has of its own."""
    first, _ = parameters[0]
    weights = [weight for _, weight in parameters]
    hidden = [key for key in first if key.startswith("input_tuning_fc1")]
    shared = [key for key in first if key.startswith("input_tuning_activation")]
    for key in shared + (hidden if combination_type == "linear" else []):
        for name, (other, _) in zip(names, parameters, strict=True):
            if not torch.equal(other[key], first[key]):
                remedy = INSTEAD if key in shared else 'combination_type="cat" keeps the hidden units of each.'
                raise ValueError(
                    f"`adapters` has {names[0]!r} and {name!r}, whose `{key}` is not the same: their sum is no "
                    f"adapter of the same size. {remedy}"
                )
    values = {key: first[key].clone() for key in shared}
    for key in first:
        every = [other[key] for other, _ in parameters]
        if key in hidden:
            values[key] = first[key].clone() if combination_type == "linear" else torch.cat(every)
        elif key == "input_tuning_fc2.weight" and combination_type == "cat":
            values[key] = torch.cat([value * weight for value, weight in zip(every, weights, strict=True)], dim=1)
        elif key.startswith("input_tuning_fc2"):
            values[key] = _sum(every, weights)
    return values


def _sum(tensors: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def _check_same(field: str, values: dict[str, object]) -> None:
    if len(set(values.values())) > 1:
        raise ValueError(f"`adapters` must have one `{field}` for an exact sum, got {values}. {INSTEAD}")

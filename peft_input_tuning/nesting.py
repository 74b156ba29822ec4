"""A `PeftModel` around a `PeftModel`: input-tuning around a model with LoRA, or LoRA around one with input-tuning.

    PeftModel ─ InputTuningModel ─ PeftModel ─ LoraModel ─ LlamaForCausalLM          as prompt-tuning around LoRA

The outer one has configurations, switches and files of its own, and the inner one stays as it is. PEFT's tuners share
the inner one's dict of configurations and reach into all layers below them, whosever they are (`BaseTuner`, 0.18 to
0.21), so that this has to be kept apart by hand.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import InputTuningConfig
from .layer import InputTuningLayer

_TRAINED_BESIDE = (AuxiliaryTrainingWrapper, TrainableTokensLayer)


def plain_model(model: nn.Module) -> nn.Module:
    """The model under all `PeftModel`s around it."""
    while isinstance(model, PeftModel):
        model = model.get_base_model()
    return model


def own_modules(model: nn.Module, configs: dict[str, PeftConfig]) -> list[tuple[str, nn.Module]]:
    """What adapters of input-tuning put into a model, by its path: the layer, and their `modules_to_save`.

    Args:
        model: the model that they were put into; a `PeftModel` keeps what has the name of one of its own adapters.
        configs: of the adapters, and those of other methods around it.
    """
    ours = {name for name, config in configs.items() if isinstance(config, InputTuningConfig)}
    if isinstance(model, PeftModel):
        ours -= model.peft_config.keys()
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, InputTuningLayer)
        or (isinstance(module, AuxiliaryTrainingWrapper) and not ours.isdisjoint(module._adapters))
    ]


class Configurations(dict):
    """The configurations of an `InputTuningModel` by the names of their adapters.

    Another method's `get_peft_model` around it puts its own into this dict: over one of the same name, which would be
    saved and loaded as that method's from then on. That is refused, before the method touches the model.
    """

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        if isinstance(self.get(name), InputTuningConfig) and not isinstance(config, InputTuningConfig):
            raise ValueError(
                f"`adapter_name` is {name!r}, the name of an input-tuning adapter of the model inside, whose "
                f"configuration the {type(config).__name__} would replace. Pass another: "
                'get_peft_model(model, config, adapter_name="outer").'
            )
        super().__setitem__(name, config)

    def update(self, *others: Any, **named: Any) -> None:
        for name, config in dict(*others, **named).items():
            self[name] = config


def check_inner_reads_ids(model: nn.Module) -> None:
    """Prompt-tuning looks ids up itself, in the embedding that it found when it was made."""
    while isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"`model` is a PeftModel with {model.peft_type.value}, which looks embeddings up past the "
                "input-adapter. Turn a trained prompt into the start of input-tuning with from_prompt_tuning, or call "
                "get_peft_model with the base model (`get_base_model()`)."
            )
        model = model.get_base_model()


def check_trained_modules_inside(model: nn.Module, adapter_name: str, embedding: nn.Module) -> None:
    """Tokens or whole modules that another method's adapter trains beside its layers are found by its name alone (PEFT
    0.21): an adapter of another name switches them off, or cannot be saved.

    Args:
        model: what gets the adapter; a `PeftModel` has the other one inside.
        adapter_name: the new adapter's name.
        embedding: of words, with what is around it.
    """
    if not isinstance(model, PeftModel):
        wrapped = [type(one).__name__ for one in embedding.modules() if isinstance(one, _TRAINED_BESIDE)]
        if wrapped:
            raise ValueError(
                f"The embedding of `model` is in a {wrapped[0]}: another adapter trains words, and PEFT cannot have a "
                "second one active beside it. Give that adapter to get_peft_model first, and the model that it "
                "returns to get_peft_model with the InputTuningConfig, both under one `adapter_name`."
            )
        return
    for path, module in model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper) or adapter_name in module._adapters:
            continue
        others = sorted(module._adapters & model.peft_config.keys())
        if others:
            raise ValueError(
                f"`adapter_name` is {adapter_name!r}, but adapter {others[0]!r} inside trains `{path}`, which PEFT "
                f"switches off for an adapter of another name. Use adapter_name={others[0]!r}."
            )


def without_trained_modules_inside(
    model: nn.Module, config: PeftConfig, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What an adapter's file holds without the modules that are not its own: PEFT saves those of an adapter inside
    that has its name with it, and would write them over that one's."""
    own = tuple(getattr(config, "modules_to_save", None) or ())
    others = tuple(
        f"{path}."
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and not path.endswith(own)
    )
    return {key: tensor for key, tensor in state_dict.items() if not key.startswith(others)}


def check_is_only_owner(model: nn.Module, adapter_name: str, has_own_model: bool) -> None:
    """A base has one embedding, and so one set of input-tuning adapters: a second `PeftModel` around it, or an adapter
    injected over one in use, would change what the first one does.

    Args:
        model: what is about to get an adapter.
        adapter_name: the new adapter's name.
        has_own_model: whether a `PeftModel` is being made for it; else the model manages its adapters itself.
    """
    layer = next((module for module in model.modules() if isinstance(module, InputTuningLayer)), None)
    if layer is None or not (layer.adapter_names if has_own_model else layer.has_adapter(adapter_name)):
        return
    raise ValueError(
        f"`model` has the input-tuning adapters {layer.adapter_names} already, and a new one ({adapter_name!r}) would "
        "change the object that they belong to: unlike prompt-tuning's, they are inside of the model. Add it there "
        f"under a name of its own (`add_adapter`, `load_adapter`), call `unload()` there first, or use a copy."
    )

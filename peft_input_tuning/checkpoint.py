"""A strict look at an adapter file before its values are used.

PEFT loads what fits and warns about the rest. Here a file that misses a tensor, has one too many, holds NaN or was
made for another size is refused, and an adapter that was created only to receive it is taken away again.
"""

from __future__ import annotations

import torch
from peft.functional import delete_adapter
from torch import Tensor, nn

from .config import InputTuningConfig
from .layer import InputTuningLayer, named_layer
from .saved_config import check_saved_config

PEFT_PREFIX = "base_model.model."
COMPILED = "_orig_mod."  # what torch.compile adds to names


def checked_state_dict(
    model: nn.Module, config: InputTuningConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gives back what is to be loaded of a file; raises where it does not fit, and takes the half-made adapter back.

    Args:
        model: the `PeftModel`, or a model with adapters of transformers.
        config: the configuration in use, of the adapter that gets the tensors.
        adapter_name: its name.
        state_dict: tensors under the names they have in the model.

    Returns:
        The tensors; without those of the base model where other adapters are on it.

    Raises:
        ValueError: names the tensor and the shapes, or the field of the configuration, and what to do.
    """
    path, layer = named_layer(model)
    try:
        saved = check_saved_config(config, adapter_name, layer.embedding_dim)
        of_base = _check(model, path, layer, adapter_name, state_dict)
        if saved is not None:
            layer.record_start(adapter_name, saved.prompt_start)
        elif not layer.has_no_weights(adapter_name):
            layer.record_start(adapter_name, None)  # tensors that came alone do not say where they started
        if len(layer.adapter_names) == 1:
            return state_dict
        _check_base_stays(model, adapter_name, of_base)
        return {key: tensor for key, tensor in state_dict.items() if key.removeprefix(PEFT_PREFIX) not in of_base}
    except ValueError:
        if layer.has_no_weights(adapter_name):
            _take_back(model, layer, adapter_name)
        raise


def under_as_many_peft_models(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under the names that they have in `model`, which may have more or fewer `PeftModel`s
    around it than the model that was saved: LoRA inside, or merged."""
    path, _ = named_layer(model)
    depth = max(1, (len(path) - len(_without_prefixes(path))) // len(PEFT_PREFIX))
    return {PEFT_PREFIX * depth + _without_prefixes(name_in_file(key)): one for key, one in state_dict.items()}


def name_in_file(key: str) -> str:
    """A tensor's name in a file, whatever parts of the model are compiled."""
    return key.replace(COMPILED, "")


def _without_prefixes(path: str) -> str:
    while path.startswith(PEFT_PREFIX):
        path = path.removeprefix(PEFT_PREFIX)
    return path


def check_own_tensors(
    layer: InputTuningLayer, name: str, found: dict[str, Tensor], path: str, called: str | None = None
) -> dict[str, str]:
    """Raises if a file does not hold an adapter's tensors.

    Args:
        layer: the layer with the adapter, its parameters of the right shapes.
        name: the adapter.
        found: the file's tensors by key.
        path: the layer's path in the keys.
        called: what errors call the adapter; None is its name.

    Returns:
        The keys of the adapter's own tensors → its parameters, as in `layer.named_adapter_parameters`.
    """
    called, own = called or name, {}
    for key, parameter in layer.named_adapter_parameters(name):
        container, _, leaf = key.partition(".")
        full = f"{path}.{container}.{name}.{leaf}"
        own[full] = key
        tensor = found.get(full)
        if tensor is None:
            raise ValueError(
                f"The file of adapter {called!r} has no `{key}`. It is incomplete, or its adapter_config.json belongs "
                "to another adapter. Save the adapter again and load that."
            )
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"`{key}` of adapter {called!r} has the shape {tuple(tensor.shape)} in the file, but this model needs "
                f"{tuple(parameter.shape)} (embedding size {layer.embedding_dim}). Load the adapter on the base model "
                "that it was trained on, with its own adapter_config.json."
            )
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(
                f"`{key}` of adapter {called!r} holds NaN or infinite values in the file. Load an earlier checkpoint."
            )
    return own


def _check(
    model: nn.Module, path: str, layer: InputTuningLayer, name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the tensors of the base model's embeddings that the file holds."""
    found = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in state_dict.items()}
    for key in check_own_tensors(layer, name, found, path.removeprefix(PEFT_PREFIX)):
        del found[key]
    _check_what_else_is_there(model, name, found)
    return {key: tensor for key, tensor in found.items() if f".modules_to_save.{name}." not in key}


def _check_base_stays(model: nn.Module, name: str, of_base: dict[str, Tensor]) -> None:
    """PEFT saves the embeddings of a base that was resized with each of its adapters, and would write them over the
    base that others use."""
    known = {key.removeprefix(PEFT_PREFIX): value for key, value in model.state_dict().items()}
    for key, tensor in of_base.items():
        base = known[key]
        if tensor.is_meta or base.is_meta or not torch.equal(tensor.to(base), base):
            raise ValueError(
                f"The file of adapter {name!r} holds `{key}`, and this base model has other values there, which its "
                "other adapters use. Load the adapter on a base model of its own, or first."
            )


def _check_what_else_is_there(model: nn.Module, name: str, found: dict[str, Tensor]) -> None:
    """Beside the adapter a file may hold its `modules_to_save`, and the embeddings of a base that was resized. All
    else PEFT would write over the base model or another adapter."""
    known = {key.removeprefix(PEFT_PREFIX): value for key, value in model.state_dict().items()}
    embeddings = _embedding_paths(model)
    for key, tensor in found.items():
        if key not in known or not (f".modules_to_save.{name}." in key or key.rpartition(".")[0] in embeddings):
            raise ValueError(
                f"The file of adapter {name!r} holds `{key}`, which this adapter does not have. Its "
                "adapter_config.json belongs to another adapter, or it was not made by input-tuning."
            )
        if tensor.shape != known[key].shape:
            raise ValueError(
                f"`{key}` has the shape {tuple(tensor.shape)} in the file of adapter {name!r}, but this model needs "
                f"{tuple(known[key].shape)}. Load the adapter on the base model that it was trained on, its embedding "
                "resized and its `num_labels` set as they were then."
            )
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(
                f"`{key}` of adapter {name!r} holds NaN or infinite values in the file. Load an earlier checkpoint."
            )


def _embedding_paths(model: nn.Module) -> set[str]:
    wanted = [named_layer(model)[1].base_layer]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        wanted.append(getattr(module, "base_layer", module))
    return {
        path.removeprefix(PEFT_PREFIX)
        for path, module in model.named_modules(remove_duplicate=False)
        if any(module is other for other in wanted)
    }


def _take_back(model: nn.Module, layer: InputTuningLayer, name: str) -> None:
    if len(layer.adapter_names) > 1:
        delete_adapter(model, name, prefix="input_tuning_", layer_cls=InputTuningLayer)
        model.peft_config.pop(name, None)
    elif hasattr(model, "base_model") and hasattr(model.base_model, "unload"):
        model.base_model.unload()

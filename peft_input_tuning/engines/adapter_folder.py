"""An adapter's own folder, read without its base model: how many virtual tokens, the prompt, and T.

    adapter_config.json          InputTuningConfig
    adapter_model.safetensors    <path of the embedding>.input_tuning_{prompt,fc1,fc2}.{weight,bias}

An engine has the base's table already, in a form of its own; all that it needs are these.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint import check_own_tensors
from ..config import InputTuningConfig
from ..layer import InputTuningLayer
from ..prompt_embeds import soft_prompt

INPUT_ONLY = (
    'Adapter {name!r} has adapter_scope="input": a word has one embedding in the input and another in the output, and '
    "an engine that goes by token ids knows one. Send it `prompt_embeds` in place of ids "
    '(peft_input_tuning.engines.embeds_prompts makes them), or train with adapter_scope="all".'
)
OWN_NAME = "served"  # in the layer, whatever the engine calls the adapter: a module's name may have no dot
MARK = ".input_tuning_"  # before the containers of InputTuningLayer, in the keys of a file


@dataclass(frozen=True)
class Adapter:
    """What an engine needs of an adapter.

    Args:
        prompt: the virtual tokens, `(num_virtual_tokens, embedding_dim)`, float32.
        adapt: T, `(n, embedding_dim)` → `(n, embedding_dim)`, float32 on the device asked for.
    """

    prompt: Tensor
    adapt: Callable[[Tensor], Tensor]

    @property
    def device(self) -> torch.device:
        """vLLM asks what it keeps of an adapter for this, and to pin it if it is on a CPU."""
        return self.prompt.device

    def pin_memory(self) -> Adapter:
        return self


def is_input_tuning(folder: Path) -> bool:
    """Whether a folder holds an adapter of this package, by its `adapter_config.json` alone."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # the engine's own reader says what is wrong with it
    return isinstance(config, dict) and config.get("peft_type") == "INPUT_TUNING"


def served_config(folder: Path, name: str) -> InputTuningConfig:
    """Reads an adapter's configuration.

    Args:
        folder: the adapter's folder.
        name: what the engine calls the adapter, for errors.

    Raises:
        ValueError: an adapter that an engine which goes by token ids cannot serve.
    """
    config = InputTuningConfig.from_pretrained(str(folder))
    if config.adapter_scope == "input" and config.adapter_hidden_dim != 0:
        raise ValueError(INPUT_ONLY.format(name=name))
    if config.modules_to_save:
        raise ValueError(
            f"Adapter {name!r} trained `modules_to_save` {list(config.modules_to_save)} beside the embedding, and an "
            "engine takes the embedding's only. Export it with `peft-input-tuning export`, and serve that."
        )
    return config


def read_adapter(folder: Path, name: str, embedding_dim: int, device: torch.device) -> Adapter:
    """Reads an adapter.

    Args:
        folder: the adapter's folder.
        name: what the engine calls the adapter, for errors.
        embedding_dim: size of the base's word embeddings.
        device: where T is to run.

    Raises:
        ValueError: a file that does not belong to its configuration or to this base, or an adapter that cannot be
            served.
    """
    config = served_config(folder, name)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(
            f"Adapter {name!r} has no file {str(file)!r}. Save it with save_pretrained, in its default form."
        )
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} of adapter {name!r} cannot be read ({error}). Save it again.") from None
    layer = InputTuningLayer(nn.Embedding(1, embedding_dim))
    layer.update_layer(OWN_NAME, _as_new(config))
    path, found = _with_own_name(name, found)
    own = check_own_tensors(layer, OWN_NAME, found, path, called=name)
    beside = sorted(found.keys() - own.keys())
    if beside:
        raise ValueError(
            f"The file of adapter {name!r} holds `{beside[0]}` beside the adapter: its base was changed in training, "
            "and an engine serves the base as it is. Export it with `peft-input-tuning export`, and serve that."
        )
    parameters = dict(layer.named_adapter_parameters(OWN_NAME))
    with torch.no_grad():
        for key, parameter in own.items():
            parameters[parameter].copy_(found[key])
    layer.requires_grad_(False).float().to(device)
    return Adapter(soft_prompt(layer, OWN_NAME), layer.plain_adapter(OWN_NAME))


def _as_new(config: InputTuningConfig) -> InputTuningConfig:
    """The configuration of an adapter of the same sizes that starts from nothing: the file's values replace it."""
    new = replace(
        config, weights_in_checkpoint=False, init_weights=False, prompt_tuning_init="RANDOM", tokenizer_kwargs=None
    )
    new.inference_mode = False
    return new


def _with_own_name(name: str, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The embedding's path in a file's keys, and the tensors with a name of the adapter in their keys, which PEFT
    leaves out of files; `name` is for errors."""
    paths = {key.partition(MARK)[0] for key in tensors if MARK in key}
    if len(paths) != 1:
        raise ValueError(
            f"The file of adapter {name!r} has {len(paths)} embeddings with an adapter of input-tuning, where one is "
            "wanted. Save the adapter again with save_pretrained."
        )
    named = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        named[f"{module}.{OWN_NAME}.{leaf}" if MARK in key else key] = tensor
    return paths.pop(), named

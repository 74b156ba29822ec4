"""The configuration that lies beside an adapter file, checked against the one that its weights come under.

PEFT reads `adapter_config.json` only for a name that is new: over an adapter in use it copies tensors. Weights that
were trained with one activation would then go on under another, and nothing would say so.
"""

from __future__ import annotations

import inspect
from typing import Any

from peft import PeftModel
from peft.config import PeftConfig

from .config import InputTuningConfig


def check_saved_config(in_use: InputTuningConfig, adapter_name: str, embedding_dim: int) -> InputTuningConfig | None:
    """Refuses a file whose weights were trained to mean something else than they would mean here.

    Args:
        in_use: the configuration of the adapter that gets the weights.
        adapter_name: its name.
        embedding_dim: size of the word embeddings.

    Returns:
        The configuration beside the file; None for tensors without a folder.

    Raises:
        ValueError: names the field, both values, and what to do.
    """
    saved = _config_being_loaded()
    if saved is None:
        return None
    instead = (
        "Load the file under a name of its own, or take the adapter away first with "
        f"delete_adapter({adapter_name!r}). To go on training from the file, make the model with its configuration."
    )
    if not isinstance(saved, InputTuningConfig):
        raise ValueError(
            f"The adapter_config.json to be loaded into adapter {adapter_name!r} is a {type(saved).__name__}, not an "
            f"InputTuningConfig. {instead}"
        )
    here = _meaning(in_use, embedding_dim)
    for field, value in _meaning(saved, embedding_dim).items():
        if value != here[field]:
            raise ValueError(
                f"`{field}` is {value!r} in the adapter_config.json to be loaded, but adapter {adapter_name!r} has "
                f"{here[field]!r}, with which the file's weights would mean something else. {instead}"
            )
    return saved


def _meaning(config: InputTuningConfig, embedding_dim: int) -> dict[str, Any]:
    """What decides on what the weights mean; fields of a part that the adapter does not have decide on nothing. Sizes
    come first: of two with the same sizes, the same fields are looked at."""
    hidden = 2 * embedding_dim if config.adapter_hidden_dim is None else config.adapter_hidden_dim
    meaning: dict[str, Any] = {"num_virtual_tokens": config.num_virtual_tokens, "adapter_hidden_dim": hidden}
    if config.num_virtual_tokens:
        meaning["prompt_scale"] = config.prompt_scale
    if hidden:
        fields = ("adapter_activation", "adapter_bias", "adapter_scope")
        meaning.update({field: getattr(config, field) for field in fields})
    return meaning


def _config_being_loaded() -> PeftConfig | None:
    """The configuration in the folder that `PeftModel.load_adapter` is loading; None for tensors without a folder.

    PEFT (0.21) hands the tensors on to its tuners, and no word of where they come from. So the call under way is
    looked for, and asked for its argument `model_id`, and for `hf_hub_download_kwargs`, a name inside of it.
    """
    loading = inspect.unwrap(PeftModel.load_adapter).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not loading:
        frame = frame.f_back
    if frame is None:
        return None
    return PeftConfig.from_pretrained(frame.f_locals["model_id"], **frame.f_locals["hf_hub_download_kwargs"])

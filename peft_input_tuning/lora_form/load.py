"""Back from a LoRA folder to the adapter that it was made of.

act(W1 · E) does not tell W1, so the folder keeps the adapter itself, and a hash of the LoRA that was made of it: one
that was trained further since is another adapter.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from ..checkpoint import PEFT_PREFIX

ADAPTER_FOLDER = "input_tuning"
ORIGIN_FILE = "lora_form.json"


def from_lora(base: nn.Module, lora: str | Path, adapter_name: str = "default") -> PeftModel:
    """Loads the input-tuning adapter that `save_as_lora` made a LoRA of, with its weights to the bit.

    Args:
        base: the base model, without adapters.
        lora: folder or hub id of the LoRA.
        adapter_name: what the adapter is called in the result.

    Raises:
        ValueError: the folder is not of `save_as_lora`, or its LoRA was changed since.
    """
    folder = Path(lora) if Path(lora).is_dir() else Path(snapshot_download(str(lora)))
    own = folder / ADAPTER_FOLDER
    try:
        made_of = json.loads((own / ORIGIN_FILE).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"`lora` is {str(lora)!r}, which has no {ADAPTER_FOLDER}/{ORIGIN_FILE}: save_as_lora did not write it. A "
            "LoRA does not tell the input-adapter behind it; load it with PeftModel.from_pretrained as it is."
        ) from None
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() or _sha256(weights) != made_of:
        raise ValueError(
            f"`lora` is {str(lora)!r}, whose adapter_model.safetensors is not the one that save_as_lora wrote: it was "
            f"changed or trained since. Load it with PeftModel.from_pretrained, or the adapter that it came from, "
            f"{str(own)!r}."
        )
    return PeftModel.from_pretrained(base, str(own), adapter_name=adapter_name)


def write_origin(folder: Path, model: nn.Module, adapter_name: str, lora_file: Path) -> None:
    """Writes the adapter itself into `folder`, and which LoRA file is made of it."""
    folder.mkdir()
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.inference_mode = True
    state = {f"{PEFT_PREFIX}{key.removeprefix(PEFT_PREFIX)}": value.cpu().clone() for key, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / ORIGIN_FILE).write_text(json.dumps({"sha256": _sha256(lora_file)}), encoding="utf-8")
    config.save_pretrained(str(folder))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

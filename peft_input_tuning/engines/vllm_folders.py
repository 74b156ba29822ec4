"""Adapters' folders as vLLM keeps adapters: a `LoRAModel`, and a resolver for a folder of folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from .adapter_folder import is_input_tuning, read_adapter
from .vllm_embedding import EmbeddingByWord
from .vllm_engine import NO_ROOM, NOT_STARTED

logger = init_logger(__name__)


def lora_model(layers: dict[str, Any], folder: Path, name: str, number: int) -> LoRAModel:
    """Reads an adapter's folder.

    Args:
        layers: vLLM's layers that adapters may change, by their paths.
        folder: the adapter's folder.
        name: what a request calls it.
        number: what vLLM calls it.

    Raises:
        ValueError: an adapter that cannot be served, or an engine that was not started for it.
    """
    ours = [(path, layer) for path, layer in layers.items() if isinstance(layer, EmbeddingByWord)]
    if len(ours) != 1:
        raise ValueError(NOT_STARTED.format(name=name))
    path, layer = ours[0]
    adapter = read_adapter(folder, name, layer.base_layer.embedding_dim, layer.tables.device)
    count, most = len(adapter.prompt), layer.most_virtual_tokens
    if count > most:
        raise ValueError(NO_ROOM.format(name=name, count=count, most=most))
    weights = LoRALayerWeights(path, rank=1, lora_alpha=1, lora_a=adapter, lora_b=adapter)
    return LoRAModel(number, rank=1, loras={path: weights})


class FolderResolver(LoRAResolver):
    """Finds adapters of input-tuning by name in vLLM's folder of adapters, as vLLM's own finds LoRAs there."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).resolve()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """An adapter of that name, trained on that base; None if there is none, or it is not one of input-tuning."""
        path = (self.folder / lora_name).resolve()
        if path.parent != self.folder or not is_input_tuning(path):
            return None
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        trained_on = config.get("base_model_name_or_path")
        if not isinstance(trained_on, str) or not _are_same(trained_on, base_model_name):
            logger.warning(
                "Adapter %r was trained on %r, and not on %r: not served.", lora_name, trained_on, base_model_name
            )
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=abs(hash(lora_name)) + 1, lora_path=str(path))


def _are_same(one: str, other: str) -> bool:
    """Whether two names are those of one model: the same words, or the same folder."""
    folders = Path(one), Path(other)
    return one == other or (all(folder.is_dir() for folder in folders) and folders[0].samefile(folders[1]))

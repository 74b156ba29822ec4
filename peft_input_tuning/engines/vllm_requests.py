"""A request for an adapter, with the adapter's virtual tokens in front: for completions, chats and token ids alike.

It is done where vLLM makes requests ready for its core, after it has checked the caller's ids and rendered templates.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.lora.utils import get_adapter_absolute_path

from .adapter_folder import is_input_tuning, served_config
from .vllm_engine import NO_ROOM, NOT_STARTED, most_virtual_tokens


def with_virtual_tokens(processor: Any, request: Any) -> Any:
    """Puts virtual tokens in front of a request that names an adapter of input-tuning; leaves others as they are.

    Args:
        processor: vLLM's `InputProcessor`.
        request: its `EngineCoreRequest`.

    Raises:
        VLLMValidationError: what cannot be with virtual tokens; HTTP 400.
    """
    lora = request.lora_request
    if lora is None:
        return request
    # An adapter that is loaded again gets another number: what is known or cached of it is by number.
    count = virtual_tokens_of(lora.lora_name, lora.lora_int_id, lora.lora_path)
    if count is None:
        return request
    config = processor.vllm_config
    most = most_virtual_tokens(config)
    if config.lora_config.target_modules is None:
        raise VLLMValidationError(NOT_STARTED.format(name=lora.lora_name))
    if count > most:
        raise VLLMValidationError(NO_ROOM.format(name=lora.lora_name, count=count, most=most))
    request.cache_salt = f"{request.cache_salt or ''}|input-tuning {lora.lora_int_id}"
    if not count:
        return request
    _check(request, lora.lora_name)
    words = config.model_config.get_vocab_size()
    request.prompt_token_ids = [*range(words, words + count), *request.prompt_token_ids]
    length = len(request.prompt_token_ids)
    processor._validate_prompt_len(length, "decoder")
    params = request.sampling_params
    params.max_tokens = min(params.max_tokens, config.model_config.max_model_len - length)
    return request


@lru_cache(maxsize=4096)
def virtual_tokens_of(name: str, number: int, path: str) -> int | None:
    """Number of virtual tokens of an adapter; None for an adapter of another method.

    Raises:
        VLLMValidationError: an adapter that cannot be served.
    """
    folder = Path(get_adapter_absolute_path(path))
    if not is_input_tuning(folder):
        return None
    try:
        return served_config(folder, name).num_virtual_tokens
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None


def _check(request: Any, name: str) -> None:
    params = request.sampling_params
    if params is None:
        raise VLLMValidationError(
            f"Adapter {name!r} has virtual tokens, which would be part of what is pooled. Ask for text, or use an "
            "adapter without virtual tokens."
        )
    if request.prompt_embeds is not None or request.prompt_token_ids is None or request.mm_features:
        raise VLLMValidationError(
            f"Adapter {name!r} is for token ids, and this request has embeddings, images or sound. Send text or ids."
        )
    if request.resumable:
        raise VLLMValidationError(
            f"Adapter {name!r} has virtual tokens, which would stand in front of each part of an input that comes in "
            "parts. Send the input as a whole."
        )
    if params.prompt_logprobs is not None:
        raise VLLMValidationError(
            f"`prompt_logprobs` (`echo` with `logprobs`) is not there for adapter {name!r}: its virtual tokens are "
            "part of the prompt, and have no logprob. Score with the adapter in transformers, or export it."
        )

"""What an adapter's embedding must know of the vLLM around it, and what is refused there by name.

Private name: `PunicaWrapperBase._token_lora_indices`, the slot of each token of a step. The others stand in `vllm.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

logger = init_logger(__name__)
SETTING = "max_virtual_tokens"
DEFAULT_MOST = 256
TARGET = "--lora-target-modules"
NOT_STARTED = (
    "Adapter {name!r} is one of input-tuning, for which this engine was not started. Start it with " + TARGET + " "
    "embed_tokens: the last part of the name of the model's word embedding in vLLM, and of layers that LoRAs change."
)
LOADED_INPLACE = (
    "Adapter {name!r} is loaded, and `load_inplace` would keep its number, under which its prompt and prefixes are "
    "known. Unload it, and load it again."
)
NO_ROOM = (
    "Adapter {name!r} has {count} virtual tokens, and this engine has room for {most}. Start it with "
    "--additional-config '{{\"" + SETTING + "\": {count}}}'."
)


def check_engine(embedding: nn.Module) -> int:
    """Returns how many virtual tokens an adapter may have in the engine that is being set up.

    Raises:
        ValueError: an engine in which adapters would be wrong, or were never tried.
    """
    config = get_current_vllm_config()
    parallel = config.parallel_config
    for name, value in (("tensor", parallel.tensor_parallel_size), ("pipeline", parallel.pipeline_parallel_size)):
        if value > 1:
            raise ValueError(
                f"`--{name}-parallel-size` is {value}: input-tuning adapters were not tried on an embedding that is "
                f"spread over devices. Use --{name}-parallel-size 1 (--data-parallel-size may be more), or leave the "
                f"embedding out of {TARGET}."
            )
    if config.model_config.enable_prompt_embeds:
        raise ValueError(
            "`--enable-prompt-embeds` and adapters by token ids cannot be in one engine: vLLM looks up a part of the "
            f"tokens then, and no longer knows their adapters. Start one engine with {TARGET} for adapters with "
            'adapter_scope="all", another with --enable-prompt-embeds.'
        )
    if config.model_config.is_multimodal_model:
        raise ValueError(
            f"{config.model_config.architectures} takes images or sound, and input-tuning adapters were not tried "
            f"beside them in vLLM. Leave the embedding out of {TARGET}, or export the adapter."
        )
    if config.speculative_config is not None:
        raise ValueError(
            "`--speculative-config` is set: a draft model does not know the adapters, and input-tuning was not tried "
            f"with it. Leave it out, or leave the embedding out of {TARGET}."
        )
    if type(embedding).forward is not VocabParallelEmbedding.forward:
        raise ValueError(
            f"The embedding is a {type(embedding).__name__}, which does more than a lookup; input-tuning was not "
            f"tried with it in vLLM. Leave the embedding out of {TARGET}, or export the adapter."
        )
    words = config.model_config.get_vocab_size()
    if embedding.org_vocab_size != words:
        raise ValueError(
            f"{TARGET} names an embedding of {embedding.org_vocab_size} words, and the model has {words}. Name the "
            "word embedding."
        )
    if config.use_v2_model_runner:
        logger.warning(
            "Input-tuning adapters were run with vLLM's model runner V1 only. VLLM_USE_V2_MODEL_RUNNER=0 chooses it."
        )
    return most_virtual_tokens(config)


def most_virtual_tokens(config) -> int:
    """`max_virtual_tokens` of vLLM's `--additional-config`, which is part of the key of its compiled graphs."""
    extra = config.additional_config if isinstance(config.additional_config, dict) else {}
    most = extra.get(SETTING, DEFAULT_MOST)
    if isinstance(most, bool) or not isinstance(most, int) or most < 0:
        raise ValueError(
            f"`{SETTING}` of --additional-config must be an integer >= 0, got {most!r}. Leave it out for "
            f"{DEFAULT_MOST}."
        )
    return most


def embedding_scale(model_config) -> float:
    """What transformers' embedding multiplies its rows with before T sees them, and vLLM's model after its lookup.

    Read off transformers' own model, built without memory: `embed_scale` is the name it has in all families (Gemma,
    BART), and the one that PEFT reads too.
    """
    with torch.device("meta"):
        embedding = AutoModelForCausalLM.from_config(model_config).get_input_embeddings()
    scale = getattr(embedding, "embed_scale", 1.0)
    if isinstance(scale, Tensor):  # on "meta" without a value, which stands beside it
        scale = getattr(embedding, "scalar_embed_scale", None)
    if not isinstance(scale, (int, float)):
        raise ValueError(
            f"{type(embedding).__name__} scales embeddings by an `embed_scale` that cannot be read, got {scale!r}. "
            "Export the adapter with `peft-input-tuning export`, and serve that."
        )
    return float(scale)


def slots_of_tokens(punica_wrapper, tokens: int) -> Tensor:
    """The slot of each token of a step, `(tokens,)`; -1 for the base model's."""
    return punica_wrapper._token_lora_indices[:tokens]

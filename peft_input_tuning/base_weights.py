"""The base model's weights: the few things that the rest has to know of their place and their kind.

The word embedding may stand under other methods' layers, and its weight may be offloaded.

An adapter needs nothing of a quantized base but embeddings and gradients. Every library keeps its numbers in its own
way, though: as a parameter of integers (bitsandbytes, HQQ, GGUF), or as a tensor subclass around several tensors that
says that it is floating point (torchao, quanto).
"""

from __future__ import annotations

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


def base_embedding(embedding: nn.Module) -> nn.Module:
    """The table itself, under what other methods put around it: a LoRA on the embedding, `trainable_token_indices`."""
    while True:
        if isinstance(embedding, AuxiliaryTrainingWrapper):
            embedding = embedding.original_module
        elif hasattr(embedding, "base_layer"):
            embedding = embedding.base_layer
        else:
            return embedding


def execution_device(embedding: nn.Module) -> torch.device:
    """Where an embedding runs. The weight of an offloaded one is on "meta" between calls (accelerate's `_hf_hook`)."""
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, but for a subclass around others."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [one for name in tensor.__tensor_flatten__()[0] for one in inner_tensors(getattr(tensor, name))]


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is kept in other numbers than those it stands for."""
    return any(not one.is_floating_point() for one in inner_tensors(weight))


def check_can_be_saved(embedding: nn.Module) -> None:
    """Saving an adapter asks all modules for their tensors; the quantized embeddings of bitsandbytes refuse.

    Raises:
        ValueError: an embedding that cannot give its tensors.
    """
    try:
        embedding.state_dict()
    except NotImplementedError as error:
        raise ValueError(
            f"The word embedding of `model` is a {type(embedding).__name__}, around which no adapter could be saved "
            f"({error}). Leave the embedding in its own dtype and quantize the rest of the model."
        ) from error


def keep_unpacked(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights at inference, as it does on CPUs with bfloat16 instructions.

    Packed weights pass no gradients on. PEFT asks for the state dict when it saves or loads an adapter; bitsandbytes
    unpacks them for that, and what comes out are other weights (private names of bitsandbytes, seen in 0.50.2).

    Raises:
        ValueError: weights that are packed already.
    """
    for path, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"`model` has been used for inference, where bitsandbytes packed the weights of {path!r}: they pass "
                "no gradients on, and saving or loading an adapter would spoil them. Load the base model again, and "
                "give it its adapter before it is used."
            )
        module.support_avx512bf16_for_cpu = False

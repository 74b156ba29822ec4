"""Running a backbone on a few ids: which ids, what comes out of it, and whether two outputs are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..base_weights import base_embedding, execution_device
from .backbone import forward_parameters

_TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.05}  # beside the largest value; 0.001 in other types
_SPECIAL = ("pad", "mask", "bos", "image", "video", "audio")


def weights_are_here(module: nn.Module) -> bool:
    """Whether a model can be run now: its weights are neither offloaded nor shards of several processes."""
    return not any(
        one.is_meta or isinstance(one, DTensor) or hasattr(one, "ds_id")  # ds_id: DeepSpeed's ZeRO-3
        for one in module.parameters()
    )


def plain_ids(module: nn.Module, embedding: nn.Module, count: int) -> Tensor:
    """Ids without a special meaning in `module.config`, `(1, count)`; a small vocabulary's repeat."""
    table = base_embedding(embedding)
    config = getattr(module, "config", None)
    special = {getattr(table, "padding_idx", None)}
    special |= {getattr(config, f"{name}_token_id", None) for name in _SPECIAL}
    plain = [number for number in range(table.num_embeddings // 2, table.num_embeddings) if number not in special]
    plain = plain or [0]
    return torch.tensor([(plain * count)[:count]]).to(execution_device(table))


def pad_id(backbone: nn.Module) -> int:
    """The id of padding; 0 if a model has none."""
    pad = getattr(backbone.config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def hidden_states(backbone: nn.Module, **inputs: Any) -> Tensor | None:
    """The last hidden state for an input, `(batch, length, dim)`; None if the output has none."""
    settings: dict[str, Any] = {"return_dict": True}
    if "use_cache" in forward_parameters(backbone):
        settings["use_cache"] = False
    return getattr(backbone(**(settings | inputs)), "last_hidden_state", None)


def states_or_none(backbone: nn.Module, **inputs: Tensor) -> Tensor | None:
    """Hidden states; None also if the backbone wants inputs of other lengths."""
    try:
        return hidden_states(backbone, **inputs)
    except Exception:
        return None


def is_same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None or found.shape != expected.shape:
        return False
    return same_but_for_rounding(found, expected)


def same_but_for_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by no more than their dtype's rounding makes of them."""
    bound = _TOLERANCE.get(expected.dtype, 1e-3) * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=0, atol=bound, equal_nan=True)

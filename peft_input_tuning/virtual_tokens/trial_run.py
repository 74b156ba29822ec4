"""Running a model once while an adapter is added, to see what it does, without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..base_weights import base_embedding, execution_device


def weights_are_here(module: nn.Module) -> bool:
    """Whether a model can be run now: its weights are neither offloaded nor shards of several processes."""
    return not any(
        one.is_meta or isinstance(one, DTensor) or hasattr(one, "ds_id")  # ds_id: DeepSpeed's ZeRO-3
        for one in module.parameters()
    )


def plain_ids(module: nn.Module, embedding: nn.Module, count: int) -> Tensor:
    """Ids without a special meaning in `module.config`, `(1, count)`; a small vocabulary's repeat."""
    table = base_embedding(embedding)
    special = {getattr(table, "padding_idx", None)}
    special |= {getattr(module.config, f"{name}_token_id", None) for name in ("pad", "mask", "bos")}
    plain = [number for number in range(table.num_embeddings // 2, table.num_embeddings) if number not in special]
    plain = plain or [0]
    return torch.tensor([(plain * count)[:count]], device=execution_device(table))


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode; afterwards modes, attributes, buffers and random numbers are what they were."""
    before = [(one, dict(one.__dict__), dict(one._buffers)) for one in module.modules()]
    kept = [(buffer, buffer.clone()) for *_, buffers in before for buffer in buffers.values() if buffer is not None]
    devices = {one.device.index for one in module.parameters() if one.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        module.eval()
        try:
            yield
        finally:
            for one, attributes, buffers in before:
                one.__dict__.clear()
                one.__dict__.update(attributes)
                one._buffers.clear()
                one._buffers.update(buffers)
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)

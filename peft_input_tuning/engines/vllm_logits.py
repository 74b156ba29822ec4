"""Words that must never be written, banned in vLLM: it does not read `suppress_tokens` of generation_config.json.

An exported checkpoint names its virtual tokens there, since its head has a logit for each. Adapters that are served
from their own folders need no ban: their virtual tokens have no logit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.interface import LogitsProcessor

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2
except ImportError:  # older versions have model runner V1 only
    LogitsProcessorV2 = object


class SuppressTokens(LogitsProcessor, LogitsProcessorV2):
    """Bans `suppress_tokens` of the served model. Of both interfaces, since both model runners load the same one."""

    def __init__(self, vllm_config: Any, device_or_state: Any, is_pin_memory: bool = False) -> None:
        device = getattr(device_or_state, "device", device_or_state)
        ids = vllm_config.model_config.try_get_generation_config().get("suppress_tokens")
        self.ids = torch.tensor(ids, dtype=torch.long, device=device) if ids else None

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Model runner V1. The ban is the same for all requests."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Model runner V2."""
        return self.ids is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """`(rows, words)` → the same, banned words at -inf."""
        return logits if self.ids is None else logits.index_fill_(1, self.ids, float("-inf"))

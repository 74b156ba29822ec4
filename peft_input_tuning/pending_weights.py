"""Adapters whose weights are still to be read from a file.

Such an adapter is made with NaN (or on "meta"); PEFT then copies the file's values in, where nothing of this package
sees it. So the first use looks: what the file did not bring is noticed by name, not silently random.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class PendingWeights(nn.Module, BaseTunerLayer):
    """The part of `InputTuningLayer` that knows which adapters wait for their files."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: set[str] = set()  # adapters whose file has still to be read

    def check_weights_have_come(self, name: str) -> None:
        """Raises where an adapter that was to be read from a file still has values that the file did not bring."""
        if name not in self.pending or torch.compiler.is_compiling():
            return
        for key, parameter in self.named_adapter_parameters(name):
            if parameter.is_meta and self._is_offloaded(key, name):
                continue
            if parameter.is_meta or not torch.isfinite(parameter).all():
                raise ValueError(
                    f"Adapter {name!r} has no usable weights: `{key}` was not in the file that was loaded, or the "
                    "file holds NaN or infinite values. Load the adapter again from a complete file. To train "
                    "a new adapter with a saved configuration, set its `weights_in_checkpoint` and `inference_mode` "
                    "to False."
                )
        self.pending.discard(name)

    def has_no_weights(self, name: str) -> bool:
        """Whether an adapter that is to be read from a file has none of the file's values yet."""
        return name in self.pending and all(
            not self._is_offloaded(key, name) if parameter.is_meta else bool(torch.isnan(parameter).all())
            for key, parameter in self.named_adapter_parameters(name)
        )

    def _is_offloaded(self, key: str, name: str) -> bool:
        """Whether accelerate keeps a parameter elsewhere, to fetch it when its module runs."""
        return any(hasattr(module, "_hf_hook") for module in getattr(self, key.partition(".")[0])[name].modules())

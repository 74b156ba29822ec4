"""Adapters whose weights are still to be read from a file.

Such an adapter is made of NaN; PEFT then copies the file's values in, where nothing of this package sees it. So the
first use looks: what the file did not bring is noticed by name, not silently random.

Until then each of its parameters is a placeholder, one NaN that is seen as a matrix of the right shape: if a
configuration asks for more than its file holds, no memory is taken for that. Values get room when they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def is_placeholder(parameter: Tensor) -> bool:
    """Whether all elements are the same place in memory."""
    return parameter.ndim > 0 and not any(parameter.stride())


class PendingWeights(nn.Module, BaseTunerLayer):
    """The part of `InputTuningLayer` that knows which adapters wait for their files."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: set[str] = set()  # adapters whose file has still to be read
        self.register_load_state_dict_pre_hook(_make_room)

    def named_adapter_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """The parameters of one adapter, as `("input_tuning_fc1.weight", parameter)`."""
        return [(f"{container}.{leaf}", module._parameters[leaf]) for container, module, leaf in self._owners(name)]

    def _owners(self, name: str) -> list[tuple[str, nn.Module, str]]:
        """Each parameter of one adapter as its container's name, its module, and its name in there."""
        return [
            (container, getattr(self, container)[name], leaf)
            for container in self.adapter_layer_names
            if name in getattr(self, container)
            for leaf, _ in getattr(self, container)[name].named_parameters()
        ]

    def hold_places(self, name: str, device: torch.device) -> None:
        """Makes placeholders of all parameters of an adapter."""
        for _, module, leaf in self._owners(name):
            parameter = module._parameters[leaf]
            nan = torch.full((), float("nan"), dtype=parameter.dtype, device=device)
            module._parameters[leaf] = nn.Parameter(nan.expand(parameter.shape))

    @contextmanager
    def small_places(self, name: str) -> Iterator[None]:
        """Lets PEFT move and cast an adapter whose placeholders it would write out as whole matrices."""
        shapes = {}
        for _, module, leaf in self._owners(name):
            parameter = module._parameters[leaf]
            if is_placeholder(parameter):
                shapes[module, leaf] = parameter.shape
                parameter.data = parameter.data[(slice(1),) * parameter.ndim]
        try:
            yield
        finally:
            for (module, leaf), shape in shapes.items():
                parameter = module._parameters[leaf]
                parameter.data = parameter.data.flatten()[0].expand(shape)

    def check_weights_have_come(self, name: str) -> None:
        """Raises where an adapter that was to be read from a file still has values that the file did not bring."""
        if name not in self.pending or torch.compiler.is_compiling():
            return
        for key, parameter in self.named_adapter_parameters(name):
            if parameter.is_meta and self._is_offloaded(key, name):
                continue
            if parameter.is_meta or is_placeholder(parameter) or not torch.isfinite(parameter).all():
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
            not self._is_offloaded(key, name)
            if parameter.is_meta
            else is_placeholder(parameter) or bool(torch.isnan(parameter).all())
            for key, parameter in self.named_adapter_parameters(name)
        )

    def _is_offloaded(self, key: str, name: str) -> bool:
        """Whether accelerate keeps a parameter elsewhere, to fetch it when its module runs."""
        return any(hasattr(module, "_hf_hook") for module in getattr(self, key.partition(".")[0])[name].modules())


def _make_room(layer: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """Before values are copied into an adapter: for those that fit, not for what a configuration claims."""
    if not isinstance(layer, PendingWeights) or metadata.get("assign_to_params_buffers"):
        return
    for name in layer.pending:
        for container, module, leaf in layer._owners(name):
            parameter, value = module._parameters[leaf], state.get(f"{prefix}{container}.{name}.{leaf}")
            if value is not None and value.shape == parameter.shape and is_placeholder(parameter):
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

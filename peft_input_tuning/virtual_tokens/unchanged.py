"""Running a model without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode; afterwards modes, attributes, parameters, buffers and random numbers are as before.

    RWKV divides weights by powers of two when it is run; NLLB's experts take another capacity.
    """
    before = [(one, dict(one.__dict__)) for one in module.modules()]
    held = [value for _, attributes in before for value in attributes.values() if type(value) in (dict, list, set)]
    containers = [(value, value.copy()) for value in held]  # what a run adds to them is taken out again
    devices = {one.device.index for one in module.parameters() if one.device.type == "cuda"}
    writes = _Writes()
    with torch.random.fork_rng(devices=devices):
        module.eval()
        try:
            with writes:
                yield
        finally:
            for one, attributes in before:
                one.__dict__.clear()
                one.__dict__.update(attributes)
            for value, copy in containers:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(copy)
            writes.undo([*module.parameters(), *module.buffers()])


class _Writes(TorchDispatchMode):
    """Keeps what stood in a tensor before it was written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            self._keep(argument, value)
        for argument in function._schema.arguments:
            self._keep(argument, kwargs.get(argument.name))
        return function(*args, **kwargs)

    def _keep(self, argument: Any, value: Any) -> None:
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
            part = (_place(value), value.storage_offset(), value.shape, value.stride())
            if part not in self._before:
                self._before[part] = value, value.clone()

    @torch.no_grad()
    def undo(self, tensors: list[Tensor]) -> None:
        ours = {_place(tensor) for tensor in tensors}
        for tensor, value in reversed(self._before.values()):
            if _place(tensor) in ours:
                tensor.copy_(value)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

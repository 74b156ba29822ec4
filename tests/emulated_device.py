"""Emulate an accelerator on the CPU, so that a tensor on the wrong device is found on a machine without a GPU.

A tensor on "emulated" is a real tensor of torch's PrivateUse1 backend over memory of the CPU. Every operation goes
through `_run`: it views the memory as CPU tensors, runs the operation, and puts the results on the device. As on CUDA,
an operation over tensors of two devices raises, unless the ones on the CPU are numbers (0-dim) or indices of `x[i]`.
Random numbers come from the CPU's generator.

torch 2.13 calls this way of making a backend experimental.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "emulated"
_aten = torch.ops.aten
_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_COPIES = {_aten._copy_from.default, _aten._copy_from_and_resize.default}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_twins: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()


class _Module(_DummyBackendModule):
    """What torch looks for under the name `torch.emulated`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def device(self, device) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def synchronize(self, device=None) -> None:
        pass

    def set_device(self, device) -> None:
        pass

    def get_rng_state(self, device=None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device=None) -> None:
        torch.set_rng_state(state)


def _on_device(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """The storage on the device over the memory of a CPU storage; the same one each time while it lives."""
    pointer = storage.data_ptr()
    twin = _twins.get(pointer) if pointer else None
    if twin is None or twin.memory is not storage or twin.nbytes() != storage.nbytes():
        device = torch.device(NAME, 0)
        twin = torch._C._construct_storage_from_data_pointer(pointer, device, storage.nbytes())
        twin.memory = storage
        if pointer:
            _twins[pointer] = twin
    return twin


def _place(tensor: Tensor, like: Tensor) -> Tensor:
    """Give a tensor on the device the memory and the layout of a CPU tensor."""
    twin = _on_device(like.untyped_storage())
    layout = (like.storage_offset(), like.size(), like.stride())
    return _aten.set_.source_Storage_storage_offset.redispatch(_CPU_KERNEL, tensor, twin, *layout)


def _to_device(tensor: Tensor) -> Tensor:
    return _place(torch._C._acc.create_empty_tensor([0], tensor.dtype), tensor)


def _memory(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a tensor on the device."""
    layout = (tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage().memory, *layout)


def _map(function: Callable, value):
    """A value with a function applied to all that is in its lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, item) for item in value])
    return function(value)


@cache
def _places_of_tensors(op) -> list[int]:
    return [i for i, argument in enumerate(op._schema.arguments) if isinstance(argument.type, torch.TensorType)]


def _check_devices(op, args: tuple, kwargs: dict) -> None:
    if op in _COPIES:
        return
    if op.overloadpacket in _INDEXING:  # its second argument, the indices, may be on the CPU
        args = (args[0], *args[2:])

    def check(value) -> None:
        if isinstance(value, Tensor) and value.device.type != NAME and value.ndim:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {op} got one on {value.device}, of shape "
                f"{tuple(value.shape)}."
            )

    _map(check, [args, [*kwargs.values()]])


def _run(op, *args, **kwargs):
    if op.overloadpacket is _aten.set_:
        return op.redispatch(_CPU_KERNEL, *args, **kwargs)
    for i in _places_of_tensors(op):  # of `x % 3` in C++, where 3 is a tensor already, Python gets a number
        if i < len(args) and isinstance(args[i], (bool, int, float, complex)):
            args = (*args[:i], torch.tensor(args[i]), *args[i + 1 :])
    _check_devices(op, args, kwargs)
    seen: list[tuple[Tensor, Tensor]] = []  # on the device, and over its memory

    def to_memory(value):
        if isinstance(value, Tensor) and value.device.type == NAME:
            seen.append((value, _memory(value)))
            return seen[-1][1]
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{value.device.type}'")
        return value

    def to_device(value):
        if not isinstance(value, Tensor):
            return value
        same = [tensor for tensor, memory in seen if memory is value]
        return same[0] if same else _to_device(value)

    moved = _map(to_memory, args)
    if op in _COPIES:
        moved[1].copy_(moved[0])
        return args[1]
    out = op(*moved, **{name: _map(to_memory, value) for name, value in kwargs.items()})
    for tensor, memory in seen:  # an operation may have given it other memory or another shape
        if (
            tensor.shape != memory.shape
            or tensor.stride() != memory.stride()
            or tensor.data_ptr() != memory.data_ptr()
        ):
            _place(tensor, memory)
    return _map(to_device, out)


_new_storage = torch.UntypedStorage.__new__


def _storage(cls, *args, device=None, **kwargs):
    if device is None or torch.device(device).type != NAME:
        return _new_storage(cls, *args, **({} if device is None else {"device": device}), **kwargs)
    return _on_device(_new_storage(cls, *args, **kwargs))


_apply_to_data = torch.nn.Module._apply


def _apply(module: torch.nn.Module, function: Callable, recurse: bool = True) -> torch.nn.Module:
    """`module.to(...)`: parameters stay the same objects, and shared ones shared, as between the CPU and CUDA."""
    some, before = next(module.parameters(), None), torch.__future__.get_swap_module_params_on_conversion()
    moves = some is not None and function(some.detach()).device != some.device
    torch.__future__.set_swap_module_params_on_conversion(moves)
    try:
        return _apply_to_data(module, function, recurse)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _pin_memory(tensor: Tensor, *_) -> Tensor:
    if tensor.device.type == NAME:
        raise RuntimeError(f"cannot pin a tensor on {NAME}; only dense CPU tensors can be pinned")
    return tensor


def _autocast(op):
    """An operation as autocast runs it: sums over many products in the lower precision, norms in float32."""

    def cast(value):
        dtype = torch.float32 if op is _aten.layer_norm else torch.get_autocast_dtype(NAME)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def run(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return run


def register() -> None:
    """Make the device known to torch, once in a process."""
    global _library, _rules  # they hold only as long as somebody holds them
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch.nn.Module._apply = _apply
    torch.UntypedStorage.__new__ = _storage  # torch has no allocator for the device
    _library = torch.library.Library("_", "IMPL")
    _library.fallback(_run, "PrivateUse1")
    _library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _rules = torch.library.Library("aten", "IMPL")
    _rules.impl("convolution_overrideable", partial(_run, _aten.convolution.default), "PrivateUse1")
    _rules.impl("histc", lambda x, *args: _to_device(torch.histc(x.cpu().float(), *args).to(x.dtype)), "PrivateUse1")
    sums = (_aten.linear, _aten.matmul, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.scaled_dot_product_attention)
    for op in (*sums, _aten.layer_norm):
        _rules.impl(op.default.name(), _autocast(op), "AutocastPrivateUse1")
    Tensor.pin_memory, Tensor.is_pinned = _pin_memory, lambda *_: False

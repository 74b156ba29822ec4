"""The highest point of memory while something runs, counted by torch's allocators rather than by the system; and what
is kept for the backward pass, put elsewhere meanwhile."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that `work` needs at its highest point, beyond what is allocated before.

    On a GPU torch keeps the highest point itself. On a CPU torch's profiler records each allocation and release; what
    libraries take past torch's allocator is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    # Private names of torch (>= 2.0): its public tables add allocations up by operator and lose their order.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def resident(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of a model's weights and buffers, of gradients that are kept, and of an optimizer's state."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    if optimizer is not None:
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    unique = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(unique.values())


def offloaded_activations(model: nn.Module, device: torch.device) -> AbstractContextManager:
    """What the forward pass keeps for the backward pass goes to the CPU's memory, or from there to the disk.

    Both passes run inside; torch's `save_on_cpu` does nothing for a model that is on the CPU already.
    """
    return save_on_cpu() if device.type == "cuda" else _ActivationsOnDisk(model)


class _ActivationsOnDisk(saved_tensors_hooks):
    """Weights, which stay in memory anyway, and small tensors are left where they are."""

    SMALLEST = 1 << 10  # bytes

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._write, self._read)
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def __enter__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="activations-")
        self._files = 0
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._folder.cleanup()

    def _write(self, tensor: Tensor) -> Tensor | tuple[Path, torch.Size, torch.dtype]:
        if tensor.untyped_storage().data_ptr() in self._weights or tensor.nbytes < self.SMALLEST:
            return tensor
        self._files += 1
        file = Path(self._folder.name) / str(self._files)
        tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tofile(file)
        return file, tensor.shape, tensor.dtype

    def _read(self, packed: Tensor | tuple[Path, torch.Size, torch.dtype]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        file, shape, dtype = packed
        tensor = torch.empty(shape, dtype=dtype)
        with file.open("rb") as stream:
            stream.readinto(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        return tensor

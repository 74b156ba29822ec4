"""The highest point of memory while something runs, counted by torch's allocators rather than by the system."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


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

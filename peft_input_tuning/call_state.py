"""Which adapter each row of the current call uses (`adapter_names=[...]`), and whether `generate` makes the call.

All are properties of one call, not of the model: two threads may call one model with different rows. So they live in
context variables, which every thread has for itself. Compiled code does not read them: it leaves its graph for what
depends on rows (`out_of_graphs_if_mixed`), and outside of training such calls run eagerly as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from threading import Lock
from typing import Any

import torch

BASE = "__base__"  # PEFT's name for "no adapter" in a mixed batch


@dataclass(frozen=True)
class RowAdapters:
    """The adapter and the prompt length of each row as the caller counts rows.

    Args:
        names: the adapters.
        prompt_lengths: their numbers of virtual tokens.
        in_generate: whether rows may come repeated, for beams and return sequences.
    """

    names: tuple[str, ...]
    prompt_lengths: tuple[int, ...]
    in_generate: bool = False
    _kept: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def _repeats(self, batch: int) -> int:
        repeats, rest = divmod(batch, len(self.names))
        if rest or (repeats != 1 and not self.in_generate):
            raise ValueError(
                f"`adapter_names` has {len(self.names)} names for a batch of {batch} rows. Pass one name a row. (Rows "
                "that `generate` repeats for beams share a name; that needs a PeftModel with a task type.)"
            )
        return repeats

    def names_of(self, batch: int) -> list[str]:
        """The names, repeated for beams and return sequences."""
        repeats = self._repeats(batch)
        return [name for name in self.names for _ in range(repeats)]

    def lengths_of(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """Prompt lengths `(batch, 1)`; None where all are the same."""
        repeats = self._repeats(batch)
        if len(set(self.prompt_lengths)) == 1:
            return None
        lengths = [[length] for length in self.prompt_lengths for _ in range(repeats)]
        return self.kept(("lengths", batch, device), lambda: on_device(lengths, device))

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for all steps of `generate`."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @property
    def slots(self) -> int:
        return max(self.prompt_lengths)


@dataclass(frozen=True)
class Generation:
    """What a `generate` does with the arguments that it looked at once, at its start.

    Args:
        in_chunks: whether the input is fed in chunks, each with its own part of the mask; later tokens get ones.
        makes_positions: whether positions are `generate`'s own: of a row they go up from the first token's.
    """

    in_chunks: bool = False
    makes_positions: bool = True


def on_device(values: list, device: torch.device) -> torch.Tensor:
    """A tensor of host values, numbers or rows of them, for which the host does not wait until the device is idle."""
    return torch.tensor(values).to(device, non_blocking=True)


# With the layer that a call is about: an assistant model, called inside the same call, has a layer of its own.
_row_adapters: ContextVar[tuple[object, RowAdapters] | None] = ContextVar("row_adapters", default=None)
_generation: ContextVar[tuple[object, Generation] | None] = ContextVar("generation", default=None)


_mixed_calls = 0  # calls with rows of several adapters, in all threads
_counting = Lock()
_is_mixed = False  # whether there are any: compiled code is guarded by it, and traced once for each


def current_row_adapters(layer: object) -> RowAdapters | None:
    """The rows of the call of `layer`'s model that is under way; None where one adapter serves the whole batch."""
    if torch.compiler.is_compiling() and not _is_mixed:
        return None
    return _rows_of_call(layer)


@torch.compiler.disable
def _rows_of_call(layer: object) -> RowAdapters | None:
    owner, rows = _row_adapters.get() or (None, None)
    return rows if owner is layer else None


def out_of_graphs_if_mixed(function: Callable) -> Callable:
    """Has compiled code call a function as it is while there are mixed calls: traced, it would be for their rows."""
    as_it_is = torch.compiler.disable(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return as_it_is(*args, **kwargs) if _is_mixed else function(*args, **kwargs)

    return call


def generation_of(layer: object) -> Generation | None:
    """The `generate` of `layer`'s model that is under way; None if there is none."""
    if torch.compiler.is_compiling():
        return None
    owner, generation = _generation.get() or (None, None)
    return generation if owner is layer else None


@contextmanager
def generating(layer: object, generation: Generation) -> Iterator[None]:
    token = _generation.set((layer, generation))
    try:
        yield
    finally:
        _generation.reset(token)


@contextmanager
def use_row_adapters(layer: object, rows: RowAdapters) -> Iterator[None]:
    token = _row_adapters.set((layer, rows))
    _count_mixed_calls(1)
    try:
        yield
    finally:
        _row_adapters.reset(token)
        _count_mixed_calls(-1)


def _count_mixed_calls(more: int) -> None:
    global _mixed_calls, _is_mixed
    with _counting:
        _mixed_calls += more
        _is_mixed = _mixed_calls > 0

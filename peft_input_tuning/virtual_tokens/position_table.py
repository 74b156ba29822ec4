"""Positions of each row's own, in a decoder that takes none and counts places (BART's, Pegasus').

Its table of positions can be asked for any, though. In a call whose rows have prompts of different lengths it is:

    place                         0  1  2  3  4  5
    a row with a shorter prompt   .  .  -2 -1 a  b      its slack is masked
    positions that it gets        0  0  0  1  2  3      as if the row were alone

In every other call the table does what it does by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..base_weights import execution_device
from .subclass import Extension

_row_positions: ContextVar[Tensor | None] = ContextVar("row_positions", default=None)


class PositionTable(Extension):
    """A table of positions whose forward takes `position_ids` `(places,)`, of all rows alike."""

    needs_forward = False  # whether the table does as it is told, a trial shows

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns `(batch, length, dim)` inside `use_row_positions`, what its class returns elsewhere."""
        positions = None if torch.compiler.is_compiling() else _row_positions.get()
        if positions is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        shape, positions = positions.shape, positions.flatten().to(execution_device(self))
        found = super().forward(*args, **{**kwargs, "position_ids": positions})  # type: ignore[misc]
        return found.reshape(*shape, found.shape[-1])


@contextmanager
def use_row_positions(positions: Tensor) -> Iterator[None]:
    """Inside, the table of the backbone that runs gives the positions `(batch, length)`."""
    token = _row_positions.set(positions)
    try:
        yield
    finally:
        _row_positions.reset(token)
